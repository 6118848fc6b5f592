"""A value that is kept until another one is made."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class LastMade(Generic[T]):
    """Keeps the value that was made last, since parts of a weight are written one after the other."""

    def __init__(self) -> None:
        self._last: tuple[Hashable, T] | None = None

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns the value of a key. A value that is not the last one is made.

        Args:
            key: The key.
            make: Makes the value.
        """
        if self._last is None or self._last[0] != key:
            self._last = None  # frees its memory first
            self._last = (key, make())
        return self._last[1]

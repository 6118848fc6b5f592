"""Ownership: notices that something else has used a backend, so that its rows hold other entries than a loop thinks."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import Backend

_last_user: WeakKeyDictionary[Backend, object] = WeakKeyDictionary()


class Ownership:
    """A user's claim to the rows of a backend that several engines may share.

    Args:
        backend: The backend.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._token = object()
        self._left: dict[int, int] = {}

    def take(self, row: int) -> None:
        """Notes that a request begins in a row, whose length changes from now on."""
        self._left.pop(row, None)

    def leave(self, row: int, length: int) -> None:
        """Notes the length of a row whose request has ended."""
        self._left[row] = length

    def claim(self, lengths: Sequence[int] | NDArray[np.int64]) -> bool:
        """Makes this the last user of the backend.

        Args:
            lengths: Committed entries per row, [rows].

        Returns:
            True if it was so already, and the rows have the lengths with which they were left.
        """
        was_last = _last_user.get(self._backend) is self._token
        _last_user[self._backend] = self._token
        return was_last and all(lengths[row] == length for row, length in self._left.items())

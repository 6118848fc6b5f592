"""The base class of engines and services: they are closed at the end of a ``with`` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Literal, Self

from medusa_runtime.common.processes import ProcessBound

# The states of an engine or a service.
State = Literal["ready", "draining", "closed", "failed"]


class Closeable(ProcessBound, ABC):
    """Base of objects that have ``close()``, work in a ``with`` statement, and belong to one process."""

    @abstractmethod
    def close(self) -> None:
        """Releases threads, memory and files. A second call does nothing.

        Raises:
            ForkError: The object belongs to another process. (The end of a ``with`` block does nothing there.)
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.in_forked_child:
            self.close()

"""What is to be closed at the end of a ``with`` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Literal, Self

from medusa_runtime.common.processes import Resident

# What an engine or a service can be: see their ``state``.
State = Literal["ready", "draining", "closed", "failed"]


class Closing(Resident, ABC):
    """Base of what has a ``close()``, may stand in a ``with`` statement, and belongs to one process."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what it holds; a second time does nothing.

        Raises:
            ForkError: It belongs to another process. The end of a ``with`` block does nothing there.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_abroad:
            self.close()

"""The budget of a chat template: bytes and CPU time that one render may use."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

MAX_BYTES = 2**26  # of all values that one render makes, plus the constant costs of steps and elements
MAX_CPU_SECONDS = 3.0
MAX_BITS = 2**16  # bits of an integer
STEP = 64  # bytes charged for a step of a loop, a call or a filter; a million steps take about a second
NODE = 64  # bytes charged for an element of a list, a tuple or a dictionary
_CHECK_CLOCK = 64  # charges between two checks of the clock
_LARGE = 2**16  # bytes of a charge after which the clock is checked at once

_COLLECTIONS: tuple[type[Collection[Any]], ...] = (
    *(list, tuple, set, frozenset, dict),
    *(type(view) for view in (dict[int, int]().keys(), dict[int, int]().values(), dict[int, int]().items())),
)
_WEIGHED: tuple[type[Any], ...] = (bytes, *_COLLECTIONS)


class TooMuchWorkError(Exception):
    """A render that exceeds its budget."""


class RenderBudget:
    """The bytes and the CPU time that a render may still use."""

    def __init__(self) -> None:
        self._left = MAX_BYTES
        self._until = time.thread_time() + MAX_CPU_SECONDS
        self._steps = 0

    def spend(self, amount: int) -> None:
        """Charges an operation.

        Args:
            amount: Bytes that the operation makes, or its cost in bytes.

        Raises:
            TooMuchWorkError: The budget is spent.
        """
        self._left -= amount
        self._steps += 1
        if self._left < 0:
            raise TooMuchWorkError(f"it would make more than {MAX_BYTES // 2**20} MiB, or takes too many steps")
        if self._steps % _CHECK_CLOCK == 0 or amount > _LARGE:
            self.check_clock()

    def check_clock(self) -> None:
        """Checks the CPU time of this thread.

        Raises:
            TooMuchWorkError: The thread has used ``MAX_CPU_SECONDS`` since the render began.
        """
        if time.thread_time() > self._until:
            raise TooMuchWorkError(f"it ran for more than {MAX_CPU_SECONDS:.0f} seconds")

    def written_size(self, value: object) -> int:
        """Bytes of a value when it is written out. An object that the value holds twice counts twice.

        Raises:
            TooMuchWorkError: The size exceeds the rest of the budget.
        """
        if isinstance(value, (str, bytes)):
            return sys.getsizeof(value)
        total = 0
        waiting: list[Any] = [value]
        found: Any
        while waiting:
            found = waiting.pop()
            if isinstance(found, (str, bytes)):
                total += NODE + sys.getsizeof(found)
            elif isinstance(found, _COLLECTIONS):
                total += NODE * (1 + len(found))
                if total <= self._left:
                    waiting.extend(found)
                    if isinstance(found, dict):
                        waiting.extend(found.values())
            else:
                total += NODE
            if total > self._left:
                self.spend(total)
        return total

    def charge(self, value: Any) -> Any:
        """Charges the value that an operation made, and returns it."""
        if isinstance(value, str):
            self.spend(sys.getsizeof(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise TooMuchWorkError(f"it computes integers of more than {MAX_BITS:,} bits")
        elif isinstance(value, _WEIGHED):
            self.spend(self.written_size(value))
        return value


_current = threading.local()


@contextmanager
def bounded_render() -> Iterator[None]:
    """A context manager that gives a new budget to the templates that this thread renders inside."""
    _current.budget = RenderBudget()
    try:
        yield
    finally:
        del _current.budget


def render_budget() -> RenderBudget:
    """The budget of this thread's render."""
    found: RenderBudget = _current.budget
    return found

"""What a chat template may do: a budget of bytes and CPU time for each render."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

MAX_BYTES = 2**26  # of all that one render makes, steps and containers counted in
MAX_CPU_SECONDS = 3.0
MAX_BITS = 2**16  # of an integer
STEP = 64  # bytes that a step of a loop, a call or a filter counts as: a million of them take about a second
NODE = 64  # of an element of a list, a tuple or a dictionary
_CHECK_CLOCK = 64  # charges between looks at the clock
_LARGE = 2**16  # bytes after which it is looked at anyway

_COLLECTIONS: tuple[type[Collection[Any]], ...] = (
    *(list, tuple, set, frozenset, dict),
    *(type(view) for view in (dict[int, int]().keys(), dict[int, int]().values(), dict[int, int]().items())),
)
_WEIGHED: tuple[type[Any], ...] = (bytes, *_COLLECTIONS)


class TooMuchWorkError(Exception):
    """A render that went on for too long, or made too much."""


class Work:
    """What a render may still do."""

    def __init__(self) -> None:
        self._left = MAX_BYTES
        self._until = time.thread_time() + MAX_CPU_SECONDS
        self._steps = 0

    def spend(self, amount: int) -> None:
        """Charges for an operation.

        Args:
            amount: Bytes that it makes, or as many as it is worth.

        Raises:
            TooMuchWorkError: There is no more to spend.
        """
        self._left -= amount
        self._steps += 1
        if self._left < 0:
            raise TooMuchWorkError(f"it would make more than {MAX_BYTES // 2**20} MiB, or run through too many loops")
        if self._steps % _CHECK_CLOCK == 0 or amount > _LARGE:
            self.check_clock()

    def check_clock(self) -> None:
        """Looks at the CPU time of this thread.

        Raises:
            TooMuchWorkError: It is up.
        """
        if time.thread_time() > self._until:
            raise TooMuchWorkError(f"it ran for more than {MAX_CPU_SECONDS:.0f} seconds")

    def weigh(self, value: object) -> int:
        """Bytes that a value takes once it is written out: what it holds twice counts twice.

        Raises:
            TooMuchWorkError: It is more than there is to spend.
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

    def made(self, value: Any) -> Any:
        """Charges for what an operation made, and gives it."""
        if isinstance(value, str):
            self.spend(sys.getsizeof(value))
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise TooMuchWorkError(f"it reckons with integers of more than {MAX_BITS:,} bits")
        elif isinstance(value, _WEIGHED):
            self.spend(self.weigh(value))
        return value


_current = threading.local()


@contextmanager
def bounded_work() -> Iterator[None]:
    """Bounds what this thread's templates do inside."""
    _current.work = Work()
    try:
        yield
    finally:
        del _current.work


def work() -> Work:
    """What the render of this thread may still do."""
    found: Work = _current.work
    return found

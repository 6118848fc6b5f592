"""A clock that never goes backwards."""

from __future__ import annotations

import threading
from collections.abc import Callable


class SteadyClock:
    """Follows another clock, but stands still when that clock jumps backwards. Any thread may call it.

    Args:
        clock: The other clock. Returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen = self._now = clock()
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """The time in seconds."""
        with self._lock:
            seen = self._clock()
            self._now += max(0.0, seen - self._seen)
            self._seen = seen
            return self._now

"""A clock that never goes back."""

from __future__ import annotations

import threading
from collections.abc import Callable


class SteadyClock:
    """Adds up the steps that another clock makes forwards; where that one jumps back, this one stands still.

    All threads may ask it.

    Args:
        clock: The other one; gives seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen = self._now = clock()
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """Seconds."""
        with self._lock:
            seen = self._clock()
            self._now += max(0.0, seen - self._seen)
            self._seen = seen
            return self._now

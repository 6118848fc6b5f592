"""A backend that fails on purpose, and a clock that jumps, for ``chaos.py`` and tests."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from medusa_runtime import BackendError

KINDS: tuple[Callable[[str], Exception], ...] = (BackendError, MemoryError, RuntimeError, ValueError, KeyError, OSError)


class FaultyBackend:
    """Passes all calls on to a backend. At random, a call or an attribute raises instead, or after it was passed on.

    Args:
        backend: A backend for a service.
        rate: Probability that a call raises, before it and after it.
        seed: Seed of all random choices.

    Attributes:
        rate: The same probability. It may be changed at any time.
        raised: Number of exceptions by call.
    """

    def __init__(self, backend: Any, *, rate: float, seed: int) -> None:
        self.rate = rate
        self.raised: Counter[str] = Counter()
        self._backend = backend
        self._random = random.Random(seed)  # noqa: S311  # no secret

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._backend, name)
        if name in ("close", "name", "rows", "capacity", "max_tokens"):  # no request depends on them
            return value
        if not callable(value):
            self._perhaps_raise(name)
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            self._perhaps_raise(name)
            result = value(*arguments, **options)
            self._perhaps_raise(name)
            return result

        return call

    def _perhaps_raise(self, name: str) -> None:
        if self._random.random() < self.rate:
            self.raised[name] += 1
            raise self._random.choice(KINDS)(f"a fault in {name}, on purpose")


class JumpyClock:
    """The monotonic clock in seconds, plus an offset that ``jump`` changes.

    Attributes:
        jumps: Number of jumps.
    """

    def __init__(self) -> None:
        self.jumps = 0
        self._lock = threading.Lock()
        self._offset = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._offset

    def jump(self, seconds: float) -> None:
        """Moves the clock forwards, or backwards for negative seconds."""
        with self._lock:
            self._offset += seconds
            self.jumps += 1

"""A backend that fails on purpose, and a clock that jumps: what chaos is made of."""

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
    """Passes everything on to a backend; now and then a call or an attribute raises instead, or after it was passed on.

    Args:
        backend: A backend for a service.
        rate: The probability that a call raises.
        seed: Of all draws.

    Attributes:
        rate: As given; may be changed at any time.
        raised: How often each call raised.
    """

    def __init__(self, backend: Any, *, rate: float, seed: int) -> None:
        self.rate = rate
        self.raised: Counter[str] = Counter()
        self._backend = backend
        self._random = random.Random(seed)  # noqa: S311  # no secret

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._backend, name)
        if name in ("close", "name", "rows", "capacity", "max_tokens"):  # they keep no request waiting
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
    """Seconds of the monotonic clock, which somebody moves now and then.

    Attributes:
        jumps: How often.
    """

    def __init__(self) -> None:
        self.jumps = 0
        self._lock = threading.Lock()
        self._offset = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._offset

    def jump(self, seconds: float) -> None:
        """Moves it, forwards or backwards."""
        with self._lock:
            self._offset += seconds
            self.jumps += 1

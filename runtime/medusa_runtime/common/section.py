"""Code that one thread at a time may run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from medusa_runtime.errors import RequestError


class Section:
    """A lock that other threads wait for, and that its own thread may not take twice.

    A signal handler or a finalizer may come in the middle of the code, in the same thread. It can't wait for what it
    interrupts, and may not change what that works on.

    Args:
        what: What is at work inside, for the message: ``This engine``.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._inside: int | None = None  # the thread

    def check(self) -> None:
        """Raises ``RequestError`` if this thread is inside already."""
        if self._inside == threading.get_ident():
            raise RequestError(
                f"{self._what} is in the middle of a step, which this call interrupts in the same thread: call it "
                "from another thread, or after the step."
            )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Waits until no other thread is inside.

        Raises:
            RequestError: This thread is inside already.
        """
        self.check()
        with self._lock:
            self._inside = threading.get_ident()
            try:
                yield
            finally:
                self._inside = None

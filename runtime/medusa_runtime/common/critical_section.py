"""A critical section: code that one thread at a time may run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from medusa_runtime.errors import RequestError


class CriticalSection:
    """A lock that other threads wait for, and that raises an error if its own thread takes it twice.

    A signal handler or a finalizer may interrupt the code inside, in the same thread. It can't wait for the code that
    it interrupts, and may not change that code's data.

    Args:
        what: The object that the section protects, as the subject of messages: ``This engine``.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._inside: int | None = None  # id of the thread inside

    def check(self) -> None:
        """Raises ``RequestError`` if this thread is inside already."""
        if self._inside == threading.get_ident():
            raise RequestError(
                f"{self._what} is in the middle of a step, which this call interrupts in the same thread: call it "
                "from another thread, or after the step."
            )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A context manager that waits until no other thread is inside, and then enters.

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

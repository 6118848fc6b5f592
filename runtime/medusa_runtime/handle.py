"""The handle of a submitted request: its chunks and its end, for threads and event loops."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self

from medusa_runtime.common.closeable import Closeable
from medusa_runtime.common.numbers import number_of
from medusa_runtime.errors import MedusaError, RequestError
from medusa_runtime.request import Chunk, GenerationResult, Stats


class RequestHandle(Closeable):
    """A submitted request.

    Iterate over it for chunks, with ``for`` or ``async for``, or get the complete answer with ``result()`` or
    ``aresult()``. If the request was cancelled, was late, failed, or the service was closed, both raise the error.
    Chunks wait in the handle until they are read, so a slow reader delays no other request. As a context manager it
    cancels the request at the end of the block, unless it has ended.

    Threads and event loops may share it: each chunk goes to one of them, the end to all. In a child made by ``fork``
    it raises ``ForkError``, unless the request had ended before.

    Args:
        stats: Figures of the request.
        on_cancel: Is called when the request is cancelled.

    Attributes:
        stats: Figures of the request, also while it runs.
    """

    def __init__(self, stats: Stats, on_cancel: Callable[[MedusaError | None], None]) -> None:
        super().__init__()
        self.stats = stats
        self._on_cancel = on_cancel
        self._changed = threading.Condition()
        self._chunks: deque[Chunk] = deque()
        self._outcome: GenerationResult | MedusaError | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """True once the request has ended, with an answer or an error."""
        return self._outcome is not None

    def cancel(self) -> None:
        """Ends the request before its next step, with ``RequestCancelledError``. It does nothing if it has ended."""
        if not self.done:
            self.check_process()
            self._on_cancel(None)

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Waits for the complete answer.

        Args:
            timeout: Seconds to wait at most; None for no limit. The request goes on after that.

        Raises:
            TimeoutError: The request has not ended in that time.
            MedusaError: The request ended without an answer; the class says why.
        """
        seconds = waiting_time(timeout)
        if not self.done:
            self.check_process()
            with self._changed:
                if not self._changed.wait_for(lambda: self.done, seconds):
                    raise TimeoutError(f"The request has not ended within {timeout} seconds.")
        return self._result()

    async def aresult(self) -> GenerationResult:
        """Waits for the complete answer, for asyncio. If the awaiting task is cancelled, the request goes on."""
        while not self.done:
            await self._change(lambda: self.done)
        return self._result()

    def _result(self) -> GenerationResult:
        if isinstance(self._outcome, MedusaError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        self.check_process()
        with self._changed:
            self._changed.wait_for(self._readable)
            chunk = self._take()
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        self.check_process()
        while True:
            with self._changed:
                if self._readable():
                    chunk = self._take()
                    break
            await self._change(self._readable)
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def _readable(self) -> bool:
        return bool(self._chunks) or self.done

    def _take(self) -> Chunk | None:
        """The next chunk, or None at the end."""
        if self._chunks:
            return self._chunks.popleft()
        self._result()
        return None

    async def _change(self, reached: Callable[[], bool]) -> None:
        """Waits for the next change with which a condition holds, unless it holds already."""
        self.check_process()
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            if reached():  # else the loop would be woken for each chunk of an answer that is awaited as a whole
                with contextlib.suppress(RuntimeError):  # that event loop is closed, and nothing waits in it
                    loop.call_soon_threadsafe(event.set)

        with self._changed:
            if reached():
                return
            self._listeners.append(notify)
        try:
            await event.wait()
        finally:
            self.unlisten(notify)

    def listen(self, notify: Callable[[], None]) -> None:
        """Registers a function to be called for new chunks and for the end, in the service's thread.

        Args:
            notify: The function. It must return at once. It is also called now, for chunks that have come already.
        """
        with self._changed:
            self._listeners.append(notify)
        notify()

    def unlisten(self, notify: Callable[[], None]) -> None:
        """Removes a function that ``listen`` registered. A call of it that has begun may still come."""
        with self._changed:
            self._listeners.remove(notify)

    def take(self) -> list[Chunk]:
        """Takes the chunks that wait, which may be none, without waiting for others."""
        self.check_process()
        with self._changed:
            chunks = list(self._chunks)
            self._chunks.clear()
            return chunks

    def put(self, chunk: Chunk) -> None:
        """Receives the next chunk from the service. ``wake`` notifies the readers."""
        with self._changed:
            self._chunks.append(chunk)

    def wake(self) -> None:
        """Notifies the readers of new chunks."""
        with self._changed:
            self._changed.notify_all()
        self._notify_listeners()

    def end(self, outcome: GenerationResult | MedusaError) -> None:
        """Receives the end from the service: the complete answer, or the error that ended the request."""
        with self._changed:
            assert self._outcome is None, "a request ends once"
            self._outcome = outcome
            self._on_cancel = _do_nothing  # it may hold the handle; a cycle would stay until garbage is collected
            self._changed.notify_all()
        self._notify_listeners()

    def _notify_listeners(self) -> None:
        """Calls all listeners, without the lock: the reader that a listener wakes takes it first of all."""
        for listener in tuple(self._listeners):
            listener()

    def close(self) -> None:
        """Cancels the request. A ``with`` block calls it at its end."""
        self.cancel()


def _do_nothing(_: MedusaError | None) -> None:
    """The ``on_cancel`` of a request that has ended."""


def follow(handle: RequestHandle, on_chunk: Callable[[Chunk], None], fail: Callable[[BaseException], None]) -> None:
    """Starts a thread that calls a callback with each chunk of a request.

    Args:
        handle: The request.
        on_chunk: The callback.
        fail: Is called with an exception that the callback raises.

    Raises:
        RuntimeError: No thread can be started.
    """

    def run() -> None:
        with contextlib.suppress(MedusaError):  # ``result`` raises it
            for chunk in handle:
                try:
                    on_chunk(chunk)
                except BaseException as error:  # noqa: BLE001  # a stranger's code, which may call sys.exit
                    fail(error)
                    return

    threading.Thread(target=run, name=f"medusa-callback-{time.monotonic_ns()}", daemon=True).start()


def waiting_time(timeout: object) -> float | None:
    """Seconds that a lock can wait for, from a number of any type; None for no limit.

    Raises:
        RequestError: ``timeout`` is not a number.
    """
    if timeout is None:
        return None
    seconds = number_of(timeout)
    if math.isnan(seconds):
        raise RequestError(f"timeout is {timeout!r}: expected a number of seconds, or None.")
    return None if seconds > threading.TIMEOUT_MAX else max(seconds, 0.0)

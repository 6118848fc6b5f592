"""The service: many requests at a time, batched continuously over the rows of one backend.

One thread owns the backend (``ServiceThread``) and drives a decode loop (``DecodeLoop``). Between steps it ends
requests that were cancelled or are late. In each step it gives free rows to requests that wait, takes in one chunk of
one prompt, and verifies the trees of all rows that decode. So a long prompt delays the next tokens of other requests
by one chunk, or by the time that it takes to move its row.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

from medusa_runtime.backends import open_backend
from medusa_runtime.backends.base import Backend
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.common.closeable import Closeable, State
from medusa_runtime.common.numbers import number_of
from medusa_runtime.common.processes import close_at_exit, keep_in_children, native_work
from medusa_runtime.common.steady_clock import SteadyClock
from medusa_runtime.decoding.loop import DecodeLoop
from medusa_runtime.decoding.scheduler import Job
from medusa_runtime.decoding.sequence import TokenSequence, check_integer, check_tree_size
from medusa_runtime.errors import CallbackError, MedusaError, QueueFullError, RequestCancelledError, RequestError
from medusa_runtime.handle import RequestHandle, follow, waiting_time
from medusa_runtime.metrics import Metrics, call_hook
from medusa_runtime.request import (
    Chunk,
    GenerationResult,
    Prompt,
    RequestOptions,
    TreeSize,
    check_names,
    generation_options,
)
from medusa_runtime.service_thread import ServiceThread
from medusa_runtime.session import ChatSession
from medusa_runtime.text.tokenizer import Tokenizer
from medusa_runtime.tuning import SHARED_CHUNK


class ServiceOptions(TypedDict, total=False):
    """Options of a service; see ``MedusaService``."""

    max_queue: int
    tree_size: TreeSize
    prefill_chunk: int
    metrics: Metrics | None


class _CheckedOptions(TypedDict):
    """Options with Python's own integers, which don't overflow."""

    max_queue: int
    tree_size: TreeSize
    prefill_chunk: int


class MedusaService(Closeable):
    """Answers many requests at a time.

    Any thread and any event loop may call all methods at any time. Those that wait block a thread. An event loop calls
    ``asubmit``, ``agenerate`` and ``astream``, and other methods in a thread. In a child made by ``fork`` every call
    raises ``ForkError``. A service that is open when the process ends is closed then.

    The constructor returns once steps are measured. The first time on a machine this takes some seconds; the figures
    are kept in the bundle.

    Args:
        bundle: The bundle, checked.
        backend: The backend that runs its graph. The service is its only user, and closes it.
        tokenizer: The bundle's tokenizer, or None if it has none.
        max_queue: Requests that may wait for a row. If there are more, ``submit`` raises ``QueueFullError``.
        tree_size: Nodes per row and step. ``auto`` chooses them by the number of rows that decode, from measured step
            times. It never changes an answer, except under typical acceptance.
        prefill_chunk: Tokens of a prompt that one step takes in while other requests decode. A larger number brings
            the first token sooner, a smaller one the next tokens of the other requests.
        metrics: Hooks that the service calls while it runs.
        clock: Gives the time in seconds.

    Raises:
        RequestError: An option has a value that makes no sense.
        BackendError: The graph failed while steps were measured.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        tokenizer: Tokenizer | None,
        *,
        max_queue: int = 256,
        tree_size: TreeSize = "auto",
        prefill_chunk: int = SHARED_CHUNK,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        checked = _check_options(
            bundle, {"max_queue": max_queue, "tree_size": tree_size, "prefill_chunk": prefill_chunk}
        )
        self.bundle = bundle
        self.tokenizer = tokenizer
        self._metrics = metrics or Metrics()
        self._clock = SteadyClock(clock)
        self._thread = ServiceThread(
            bundle, backend, DecodeLoop(bundle, backend, metrics=self._metrics, clock=self._clock, **checked)
        )
        keep_in_children(backend)
        close_at_exit(self)
        self._thread.start()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "auto",
        *,
        rows: int = 4,
        threads: int | None = None,
        check_digests: bool = True,
        device: int = 0,
        gpu_memory: float | None = None,
        **options: Unpack[ServiceOptions],
    ) -> Self:
        """Opens a bundle.

        Args:
            bundle: The folder that ``medusa-export onnx`` or ``medusa-export trt`` wrote.
            backend: As for ``MedusaEngine.load``. On backends other than ``onnxruntime`` each step runs over all rows.
            rows: Requests that run at a time. A compiled engine holds as many as it was built for (``--max-batch``).
            threads: CPU threads of one step; None for all that this process may use.
            check_digests: If True, all files are read and their digests are compared.
            device: Number of the GPU that runs a compiled engine, among those that CUDA sees. For several GPUs, load a
                service for each.
            gpu_memory: Memory of the GPU that a compiled engine may use, in bytes, or as a fraction up to 1; None for
                all. If not all ``rows`` fit, the service has fewer.
            options: ``max_queue``, ``tree_size``, ``prefill_chunk`` and ``metrics``, as for the class.

        Raises:
            BundleError: The bundle can't be used; the message says why.
            BackendError: The backend is unknown or not installed, it can't load the graph, or the graph failed.
            RequestError: An option has a value that makes no sense.
        """
        rows = check_integer("rows", rows, at_least=1)
        threads = None if threads is None else check_integer("threads", threads, at_least=1)
        with native_work():
            checked = Bundle.load(bundle, check_digests=check_digests)
            _check_options(checked, options)
            tokenizer = Tokenizer.load(checked.listed)
            opened = open_backend(
                backend,
                checked,
                rows=rows,
                threads=threads,
                check_digests=check_digests,
                device=check_integer("device", device, at_least=0),
                gpu_memory=gpu_memory,
            )
            try:
                return cls(checked, opened, tokenizer, **options)
            except BaseException:
                opened.close()
                raise

    def submit(
        self,
        prompt: Prompt,
        *,
        on_chunk: Callable[[Chunk], None] | None = None,
        **options: Unpack[RequestOptions],
    ) -> RequestHandle:
        """Queues a request and returns at once.

        Args:
            prompt: Text, chat messages (``{"role": …, "content": …}``, one or a list), or token ids.
            on_chunk: Is called with each chunk, in a thread of the request's own. Use it instead of iterating over the
                handle. An exception that it raises ends the request with ``CallbackError``.
            options: See ``RequestOptions``: ``max_new_tokens``, ``stop``, ``stop_token_ids``, ``sampling``,
                ``logprobs``, ``lookup``, ``priority`` and ``timeout``.

        Raises:
            RequestError: The request can't be served; the message says why.
            QueueFullError: The queue is full.
            ServiceClosedError: The service is closed or drained.
        """
        check_names(options, RequestOptions)
        self.check_process()
        timeout = options.get("timeout")
        if timeout is not None:
            if not number_of(timeout) > 0:
                raise RequestError(f"timeout is {timeout!r}: give a request more than 0 seconds, or None.")
            timeout = number_of(timeout)
        priority = check_integer("priority", options.get("priority", 0))
        with native_work():
            sequence = TokenSequence.of(self.bundle, self.tokenizer, prompt, **generation_options(options))
        now = self._clock()
        handle = RequestHandle(sequence.stats, lambda error: self._request_end(job, error))
        job = Job(sequence, handle, priority, now, None if timeout is None else now + timeout)
        try:
            self._thread.add(job)
        except QueueFullError:
            call_hook(self._metrics.rejected)
            raise
        if on_chunk is not None:
            self._follow(job, handle, on_chunk)
        return handle

    def _request_end(self, job: Job, error: MedusaError | None) -> None:
        self._thread.request_end(job, error or RequestCancelledError("The request was cancelled."))

    def _follow(self, job: Job, handle: RequestHandle, on_chunk: Callable[[Chunk], None]) -> None:
        """Starts a thread that calls ``on_chunk`` for each chunk of a request.

        Raises:
            CallbackError: No thread can be started. The request ends.
        """

        def fail(error: BaseException) -> None:
            failure = CallbackError(f"The request's callback raised {error!r}.")
            failure.__cause__ = error
            self._request_end(job, failure)

        try:
            follow(handle, on_chunk, fail)
        except RuntimeError as error:
            failure = CallbackError(
                f"The request's callback has no thread to run in ({error}): iterate over the handle, or end other "
                "threads."
            )
            self._request_end(job, failure)
            raise failure from error

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Iterator[Chunk]:
        """Answers a prompt piece by piece: iterate over the chunks. Arguments and errors are those of ``submit``.

        Closing the iterator before its end cancels the request.
        """
        handle = self.submit(prompt, **options)

        def chunks() -> Iterator[Chunk]:
            with handle:
                yield Chunk("", ())  # starts the generator, so that closing it cancels the request; not delivered
                while (chunk := next(handle, None)) is not None:  # "yield from" would also close the handle in forks
                    yield chunk

        iterator = chunks()
        next(iterator)
        return iterator

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Answers a prompt and waits for the answer.

        Arguments and errors are those of ``submit``. Errors that end the request are raised, too.
        """
        self._thread.check_thread()
        handle = self.submit(prompt, **options)
        with handle:  # an interrupted wait cancels the request
            return handle.result()

    async def asubmit(
        self,
        prompt: Prompt,
        *,
        on_chunk: Callable[[Chunk], None] | None = None,
        **options: Unpack[RequestOptions],
    ) -> RequestHandle:
        """Submits a request, for asyncio: a thread checks and encodes the prompt, while the event loop goes on.

        A task that is cancelled meanwhile cancels its request. Requests of concurrent tasks may queue in any order.
        """
        self.check_process()  # before a thread is needed, as the event loop of a forked child may have none
        abandoned, submitted = threading.Event(), list[RequestHandle]()

        def submit() -> RequestHandle:
            submitted.append(self.submit(prompt, on_chunk=on_chunk, **options))
            if abandoned.is_set():
                submitted[0].cancel()
            return submitted[0]

        try:
            return await asyncio.to_thread(submit)
        except asyncio.CancelledError:
            abandoned.set()  # first this, then the look at ``submitted``: the thread does both in the other order
            for handle in submitted:
                handle.cancel()
            raise

    async def agenerate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Waits for a complete answer, for asyncio. A task that is cancelled cancels its request."""
        handle = await self.asubmit(prompt, **options)
        with handle:
            return await handle.aresult()

    async def astream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncIterator[Chunk]:
        """Yields chunks, for asyncio. The request is submitted when the first chunk is asked for."""
        handle = await self.asubmit(prompt, **options)
        with handle:
            async for chunk in handle:
                yield chunk

    def session(self, messages: Sequence[Mapping[str, Any]] = ()) -> ChatSession:
        """Begins a conversation, with messages that were exchanged before."""
        return ChatSession(self, messages)

    @property
    def max_tokens(self) -> int:
        """The most tokens of a prompt and its answer, which the model or the backend's caches limit."""
        held = self._thread.loop.most_tokens(self._thread.loop.sizes.tree_size)
        most = self.bundle.model.max_positions
        return most if held is None else min(most, held)

    @property
    def load_figures(self) -> tuple[int, int]:
        """The number of requests that wait, and of those that run."""
        self.check_process()
        return self._thread.load_figures

    @property
    def state(self) -> State:
        """``ready``, ``draining``, ``closed`` or ``failed``.

        A ready service accepts requests. A draining or closed one refuses them, after a call of ``drain`` or ``close``.
        A failed one refuses them as its thread has died, or as this is a forked child; see ``failure``.
        """
        return "failed" if self.in_forked_child else self._thread.state

    @property
    def failure(self) -> Exception | None:
        """The reason for the state ``failed``; None in other states."""
        return self.fork_error if self.in_forked_child else self._thread.failure

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses new requests, and waits until those that it has have ended.

        Args:
            timeout: Seconds to wait at most; None for no limit.

        Returns:
            True if all have ended.

        Raises:
            RequestError: ``timeout`` is not a number, or a hook for metrics calls this in the service's own thread.
        """
        self.check_process()
        return self._thread.drain(waiting_time(timeout))

    def close(self) -> None:
        """Ends all requests with ``ServiceClosedError`` after the current step, and gives the backend's memory back."""
        self.check_process()
        self._thread.close()


def _check_options(bundle: Bundle, options: ServiceOptions) -> _CheckedOptions:
    tree_size = options.get("tree_size", "auto")
    return {
        "prefill_chunk": check_integer("prefill_chunk", options.get("prefill_chunk", SHARED_CHUNK), at_least=1),
        "max_queue": check_integer("max_queue", options.get("max_queue", 0), at_least=0),
        "tree_size": tree_size if tree_size == "auto" else check_tree_size(bundle, tree_size),
    }

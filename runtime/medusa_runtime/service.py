"""A service: many requests at a time, batched continuously over the rows of one backend.

One thread owns the backend, a ``ServiceThread``. Between steps it lets go of requests that are cancelled or late, gives
free rows to those that wait, takes in one chunk of one prompt, and then verifies the trees of all rows that decode. So
a long prompt delays the next tokens of the others by one chunk at most, or by what it takes to move its row instead.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

from medusa_runtime.backends import open_batch_backend
from medusa_runtime.backends.base import BatchBackend
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.common.closeable import Closeable, State
from medusa_runtime.common.processes import close_at_exit, keep_in_children, native_work
from medusa_runtime.common.steady_clock import SteadyClock
from medusa_runtime.decoding.runner import BatchRunner
from medusa_runtime.decoding.scheduler import Job, Scheduler
from medusa_runtime.decoding.sequence import TokenSequence, check_integer, check_tree_size
from medusa_runtime.decoding.tree_choice import TreeSize
from medusa_runtime.errors import CallbackError, MedusaError, QueueFullError, RequestCancelledError, RequestError
from medusa_runtime.handle import RequestHandle, follow, waiting_time
from medusa_runtime.metrics import Metrics, tell
from medusa_runtime.request import Chunk, GenerationResult, Prompt, RequestOptions
from medusa_runtime.sampling import number_of
from medusa_runtime.service_thread import ServiceThread
from medusa_runtime.session import ChatSession
from medusa_runtime.text.tokenizer import Tokenizer

PREFILL_CHUNK = 64  # beside rows that decode


class ServiceOptions(TypedDict, total=False):
    """Options of a service; see ``MedusaService``."""

    max_queue: int
    tree_size: TreeSize
    prefill_chunk: int
    metrics: Metrics | None


class _CheckedOptions(TypedDict):
    """Options as Python's own numbers, which don't overflow."""

    max_queue: int
    tree_size: TreeSize
    prefill_chunk: int


class MedusaService(Closeable):
    """Answers many requests at a time.

    Any thread and any event loop may call all methods at any time. Those that wait block a thread; an event loop calls
    ``submit``, ``agenerate`` and ``astream``, and the rest in a thread. In a child made by ``fork`` every call raises
    ``ForkError``. A service that is open when the process ends is closed then.

    Args:
        bundle: The bundle, checked.
        backend: What runs its graph; the service is its only user, and closes it.
        tokenizer: Its tokenizer, or None if it has none.
        max_queue: Requests that may wait for a row; beyond that ``submit`` raises ``QueueFullError``.
        tree_size: Nodes per row and step. ``auto`` fits them to the number of rows that decode, by steps measured once
            on this machine, which takes some seconds. It never changes a result.
        prefill_chunk: Tokens of a prompt that one step takes in while other requests decode: more of them bring the
            first token sooner, fewer the next token of the others.
        metrics: What to tell about it all.
        clock: Tells seconds.

    Raises:
        RequestError: An option makes no sense.
        BackendError: The graph failed while its steps were measured.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: BatchBackend,
        tokenizer: Tokenizer | None,
        *,
        max_queue: int = 256,
        tree_size: TreeSize = "auto",
        prefill_chunk: int = PREFILL_CHUNK,
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
            BatchRunner(bundle, backend, checked["tree_size"]),
            Scheduler(backend.rows, checked["max_queue"]),
            prefill_chunk=checked["prefill_chunk"],
            metrics=self._metrics,
            clock=self._clock,
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
        **options: Unpack[ServiceOptions],
    ) -> Self:
        """Opens a bundle.

        Args:
            bundle: The folder that ``medusa-export onnx`` wrote.
            backend: ``onnxruntime``, which runs on the CPU, or ``auto``, which is the same so far.
            rows: Requests that run at a time.
            threads: CPU threads of one step; all that this process may use if None.
            check_digests: Read all files to compare their digests.
            options: ``max_queue``, ``tree_size``, ``prefill_chunk`` and ``metrics``, as for the class.

        Raises:
            BundleError: The bundle can't be served; the message says why.
            BackendError: The backend is unknown or not installed, or it can't load the graph.
            RequestError: An option makes no sense.
        """
        rows = check_integer("rows", rows, at_least=1)
        threads = None if threads is None else check_integer("threads", threads, at_least=1)
        with native_work():
            checked = Bundle.load(bundle, check_digests=check_digests)
            _check_options(checked, options)
            tokenizer = Tokenizer.load(checked.listed)
            opened = open_batch_backend(backend, checked, rows=rows, threads=threads)
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
        """Queues a request and comes back at once.

        Args:
            prompt: Text, a list of chat messages (``{"role": …, "content": …}``), or token ids.
            on_chunk: Called with each chunk, in a thread of the request's own, in place of iterating over the handle.
                What it raises ends the request with ``CallbackError``, unless it has ended before.
            options: See ``RequestOptions``.

        Raises:
            RequestError: The request can't be served as it stands.
            QueueFullError: There is no room in the queue.
            ServiceClosedError: The service is closed or about to be.
        """
        unknown = options.keys() - RequestOptions.__annotations__.keys()
        if unknown:
            known = ", ".join(RequestOptions.__annotations__)
            raise TypeError(f"There is no option {min(unknown)!r}: a request has {known}.")
        self.check_process()
        timeout = options.get("timeout")
        if timeout is not None:
            if not number_of(timeout) > 0:
                raise RequestError(f"timeout is {timeout!r}: give a request more than 0 seconds, or None.")
            timeout = number_of(timeout)
        priority = check_integer("priority", options.get("priority", 0))
        with native_work():
            sequence = TokenSequence.of(
                self.bundle,
                self.tokenizer,
                prompt,
                max_new_tokens=options.get("max_new_tokens", 128),
                stop=options.get("stop", ()),
                stop_token_ids=options.get("stop_token_ids", ()),
                sampling=options.get("sampling"),
                logprobs=options.get("logprobs", False),
                lookup=options.get("lookup", True),
            )
        now = self._clock()
        handle = RequestHandle(sequence.stats, lambda error: self._request_end(job, error))
        job = Job(sequence, handle, priority, now, None if timeout is None else now + timeout)
        try:
            self._thread.add(job)
        except QueueFullError:
            tell(self._metrics.rejected)
            raise
        if on_chunk is not None:
            self._follow(job, on_chunk)
        return handle

    def _request_end(self, job: Job, error: MedusaError | None) -> None:
        self._thread.request_end(job, error or RequestCancelledError("The request was cancelled."))

    def _follow(self, job: Job, on_chunk: Callable[[Chunk], None]) -> None:
        """Calls back in a thread of the request's own.

        Raises:
            CallbackError: No thread can be started, so that the request ends.
        """

        def fail(error: BaseException) -> None:
            failure = CallbackError(f"The request's callback raised {error!r}.")
            failure.__cause__ = error
            self._request_end(job, failure)

        try:
            follow(job.handle, on_chunk, fail)
        except RuntimeError as error:
            failure = CallbackError(
                f"The request's callback has no thread to run in ({error}): iterate over the handle, or end other "
                "threads."
            )
            self._request_end(job, failure)
            raise failure from error

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Iterator[Chunk]:
        """Answers piece by piece; closing the iterator before its end cancels the request. Otherwise as ``submit``."""
        handle = self.submit(prompt, **options)

        def chunks() -> Iterator[Chunk]:
            with handle:
                yield Chunk("", ())  # for nobody: one that has not begun could be left without cancelling anything
                while (chunk := next(handle, None)) is not None:  # "yield from" would close the handle in forks, too
                    yield chunk

        iterator = chunks()
        next(iterator)
        return iterator

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Answers a prompt and waits for it; arguments and errors as for ``submit``, besides those of the handle."""
        self._thread.check_thread()
        handle = self.submit(prompt, **options)
        with handle:  # whoever interrupts the wait wants no answer
            return handle.result()

    async def asubmit(
        self,
        prompt: Prompt,
        *,
        on_chunk: Callable[[Chunk], None] | None = None,
        **options: Unpack[RequestOptions],
    ) -> RequestHandle:
        """As ``submit``, for asyncio: a thread checks and encodes the prompt, while the event loop goes on.

        A task that is cancelled meanwhile cancels its request. Requests of tasks side by side may queue in any order.
        """
        self.check_process()  # here, as the event loop of a forked child may have no threads
        abandoned, submitted = threading.Event(), list[RequestHandle]()

        def submit() -> RequestHandle:
            submitted.append(self.submit(prompt, on_chunk=on_chunk, **options))
            if abandoned.is_set():
                submitted[0].cancel()
            return submitted[0]

        try:
            return await asyncio.to_thread(submit)
        except asyncio.CancelledError:
            abandoned.set()  # before the look at what was submitted, as the thread looks the other way round
            for handle in submitted:
                handle.cancel()
            raise

    async def agenerate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> GenerationResult:
        """As ``generate``, for asyncio; a task that is cancelled cancels its request."""
        handle = await self.asubmit(prompt, **options)
        with handle:
            return await handle.aresult()

    async def astream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncIterator[Chunk]:
        """As ``stream``, for asyncio; it submits the request when the first chunk is asked for."""
        handle = await self.asubmit(prompt, **options)
        with handle:
            async for chunk in handle:
                yield chunk

    def session(self, messages: Sequence[Mapping[str, Any]] = ()) -> ChatSession:
        """A conversation that begins with these messages."""
        return ChatSession(self, messages)

    @property
    def load_figures(self) -> tuple[int, int]:
        """How many requests wait, and how many run."""
        self.check_process()
        return self._thread.load_figures

    @property
    def state(self) -> State:
        """What it does with a new request.

        ``ready``: takes it. ``draining`` and ``closed``: refuses it, as somebody has called ``drain`` or ``close``.
        ``failed``: refuses it, as the service has died by itself, or as this is a forked child; see ``failure``.
        """
        return "failed" if self.in_forked_child else self._thread.state

    @property
    def failure(self) -> Exception | None:
        """Why the state is ``failed``; None if it is not."""
        return self.fork_error if self.in_forked_child else self._thread.failure

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for those that it has.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether all have ended.

        Raises:
            RequestError: ``timeout`` is no number, or a hook for metrics calls this in the service's own thread.
        """
        self.check_process()
        return self._thread.drain(waiting_time(timeout))

    def close(self) -> None:
        """Ends all requests with ``ServiceClosedError`` after the step at hand, and gives the backend's memory back."""
        self.check_process()
        self._thread.close()


def _check_options(bundle: Bundle, options: ServiceOptions) -> _CheckedOptions:
    tree_size = options.get("tree_size", "auto")
    return {
        "prefill_chunk": check_integer("prefill_chunk", options.get("prefill_chunk", PREFILL_CHUNK), at_least=1),
        "max_queue": check_integer("max_queue", options.get("max_queue", 0), at_least=0),
        "tree_size": tree_size if tree_size == "auto" else check_tree_size(bundle, tree_size),
    }

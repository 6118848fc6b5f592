"""A service: many requests at a time, batched continuously over the rows of one backend.

One thread owns the backend. Between steps it lets go of requests that are cancelled or late, gives free rows to those
that wait, takes in one chunk of one prompt, and then verifies the trees of all rows that decode. So a long prompt
delays the next tokens of the others by one chunk at most, or by what it takes to move its row instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self, TypedDict, Unpack

from medusa_runtime.backends import open_batch_backend
from medusa_runtime.backends.base import BatchBackend, StepResult
from medusa_runtime.batch_runner import BatchRunner
from medusa_runtime.bundle import Bundle
from medusa_runtime.closing import Closing
from medusa_runtime.errors import (
    BackendError,
    CallbackError,
    DeadlineError,
    MedusaError,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    ServiceClosedError,
)
from medusa_runtime.handle import RequestHandle, follow
from medusa_runtime.metrics import Metrics
from medusa_runtime.request import Chunk, GenerationResult, Prompt, RequestOptions
from medusa_runtime.sampling import number_of
from medusa_runtime.scheduler import Job, Scheduler
from medusa_runtime.sequence import TokenSequence, check_integer, check_tree_size
from medusa_runtime.session import ChatSession
from medusa_runtime.tokenizer import Tokenizer
from medusa_runtime.tree_choice import TreeSize

PREFILL_CHUNK = 64  # beside rows that decode
LONE_CHUNK = 512  # while none does
# Entries that may be moved in the same turn as a chunk is taken in, less than are moved at once: moving one takes a
# hundredth of computing one, or a tenth where memory is new.
MOVED_BESIDES = 64

_log = logging.getLogger(__name__)


class ServiceOptions(TypedDict, total=False):
    """Options of a service; see ``MedusaService``."""

    max_queue: int
    tree_size: TreeSize
    prefill_chunk: int
    metrics: Metrics | None


class MedusaService(Closing):
    """Answers many requests at a time; all methods may be called from any thread and any event loop.

    Args:
        bundle: The bundle, checked.
        backend: What runs its graph; the service is its only user, and closes it, unless it can't be made.
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
        _check_options(bundle, {"max_queue": max_queue, "tree_size": tree_size, "prefill_chunk": prefill_chunk})
        self.bundle = bundle
        self.tokenizer = tokenizer
        self._runner = BatchRunner(bundle, backend, tree_size)
        self._backend = backend
        self._prefill_chunk = prefill_chunk
        self._metrics = metrics or Metrics()
        self._clock = clock
        self._latest = clock()
        # Requests that somebody wants to end, and with what. Takes no lock, since a garbage collector may put it there.
        self._ends: SimpleQueue[tuple[Job, MedusaError]] = SimpleQueue()
        self._changed = threading.Condition()  # guards all below
        self._scheduler = Scheduler(backend.rows, max_queue)
        self._accepting = True
        self._closing = False
        self._runner.measure()  # before anybody has work for these cores
        self._thread = threading.Thread(target=self._run, name="medusa-service", daemon=True)
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
        check_integer("rows", rows, at_least=1)
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
        timeout, priority = options.get("timeout"), options.get("priority", 0)
        if timeout is not None and not number_of(timeout) > 0:
            raise RequestError(f"timeout is {timeout!r}: give a request more than 0 seconds, or None.")
        check_integer("priority", priority)
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
        now = self._now()
        handle = RequestHandle(sequence.stats, lambda error: self._request_end(job, error))
        job = Job(sequence, handle, priority, now, None if timeout is None else now + number_of(timeout))
        try:
            self._queue(job)
        except QueueFullError:
            self._tell(self._metrics.rejected)
            raise
        if on_chunk is not None:
            follow(handle, on_chunk, partial(self._callback_failed, job))
        return handle

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Iterator[Chunk]:
        """Answers piece by piece; closing the iterator before its end cancels the request. Otherwise as ``submit``."""
        handle = self.submit(prompt, **options)

        def chunks() -> Iterator[Chunk]:
            with handle:
                yield Chunk("", ())  # for nobody: one that has not begun could be left without cancelling anything
                yield from handle

        iterator = chunks()
        next(iterator)
        return iterator

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> GenerationResult:
        """Answers a prompt and waits for it; arguments and errors as for ``submit``, besides those of the handle."""
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
        with self._changed:
            return len(self._scheduler.waiting), len(self._scheduler.running)

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for those that it has.

        Args:
            timeout: Seconds to wait at most.

        Returns:
            Whether all have ended.
        """
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: self._scheduler.is_idle, timeout)

    def close(self) -> None:
        """Ends all requests with ``ServiceClosedError`` after the step at hand, and gives the backend's memory back."""
        with self._changed:
            self._accepting = False
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # a hook for metrics may call this
            self._thread.join()

    # What callers' threads do.

    def _queue(self, job: Job) -> None:
        with self._changed:
            if not self._accepting:
                raise ServiceClosedError("This service takes no more requests: it is closed, or is about to be.")
            self._scheduler.add(job)
            self._changed.notify_all()

    def _request_end(self, job: Job, error: MedusaError | None) -> None:
        # Nobody is told: the service's thread sleeps only where there is nothing to end.
        self._ends.put((job, error or RequestCancelledError("The request was cancelled.")))

    def _callback_failed(self, job: Job, error: Exception) -> None:
        failure = CallbackError(f"The request's callback raised {error!r}.")
        failure.__cause__ = error
        self._request_end(job, failure)

    # What the service's own thread does.

    def _run(self) -> None:
        failure: MedusaError = ServiceClosedError("The service was closed before the request was answered.")
        try:
            while self._wait_for_work():
                groups, moved = self._arranged()
                if moved <= MOVED_BESIDES:
                    self._prefill([job.row for jobs in groups for job in jobs if job.row is not None])
                for jobs in groups:
                    self._decode(jobs)
        except Exception as error:  # noqa: BLE001  # whatever it is, nobody may wait forever
            _log.exception("The service's thread failed")
            failure = BackendError(f"The service failed and is closed: {error!r}.")
            failure.__cause__ = error
        finally:
            with self._changed:
                self._accepting = False
                for job in [*self._scheduler.running.values(), *self._scheduler.waiting]:
                    self._end(job, failure)
            self._backend.close()

    def _wait_for_work(self) -> bool:
        """Until something can run; False once the service is to be closed."""
        with self._changed:
            while not self._closing:
                self._let_go()
                self._admit()
                if self._scheduler.running:
                    self._tell(self._metrics.load, len(self._scheduler.waiting), len(self._scheduler.running))
                    return True
                self._tell(self._metrics.load, 0, 0)
                if not (self._closing or self._scheduler.waiting):  # by that hook
                    self._changed.wait()
            return False

    def _let_go(self) -> None:
        """Ends requests that were cancelled or have run out of time."""
        while not self._ends.empty():  # nobody else takes from it
            job, error = self._ends.get()
            if not job.handle.done:
                self._end(job, error)
        now = self._now()
        for job in [*self._scheduler.running.values(), *self._scheduler.waiting]:
            if job.deadline is not None and now >= job.deadline:
                self._end(job, DeadlineError(f"The request was not answered in {job.deadline - job.submitted:g} s."))

    def _admit(self) -> None:
        for admission in self._scheduler.admit(self._backend.lengths):
            job, row = admission.job, admission.job.row
            assert row is not None
            job.admitted = self._now()
            job.sequence.stats.queue_seconds = job.admitted - job.submitted
            with self._blamed_on(job):
                self._runner.take_over(admission.source, row, admission.shared)
                self._backend.assign(row, job.sequence.draws)

    def _arranged(self) -> tuple[list[list[Job]], int]:
        """The requests that decode, as they step together, with room for that; and how many entries were moved."""
        with self._changed:
            jobs = {job.row: job for job in self._scheduler.decoding() if job.row is not None}
        if not jobs:
            return [], 0
        moved = 0
        self._runner.regroup(list(jobs))
        with contextlib.suppress(BackendError):  # they go on as they are
            moved += self._runner.gather()
        for rows in self._runner.groups:
            with contextlib.suppress(BackendError):  # the step itself will say so
                moved += self._runner.prepare(rows)
        return [[jobs[row] for row in rows] for rows in self._runner.groups], moved

    def _prefill(self, decoding: Sequence[int]) -> None:
        """Takes in one chunk of one prompt, beside rows that decode."""
        with self._changed:
            job = self._scheduler.prefilling()
        if job is None or job.row is None:
            return
        chunk = job.sequence.next_chunk(self._prefill_chunk if decoding else LONE_CHUNK)
        with self._blamed_on(job):
            try:
                moved = self._runner.prepare_prefill(job.row, chunk, decoding)
            except BackendError:
                self._forget_free_rows()
                moved = self._runner.prepare_prefill(job.row, chunk, decoding)
            if moved > MOVED_BESIDES and decoding:
                return  # moving them takes its time: the others first
            with self._timed("prefill", 1, len(chunk)) as tokens:
                result = self._runner.prefill(job.row, chunk, decoding)
                if not result.count[job.row]:
                    result = self._runner.retry(job.row, chunk)
                job.sequence.prefilled += len(chunk)
                tokens.append(len(chunk))
            if not job.sequence.is_prefilling:
                job.first_token = self._now()
                job.sequence.stats.prefill_seconds = job.first_token - job.admitted
                self._deliver(job, *result.emitted(job.row))

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Verifies the trees of some rows; if that fails, of each by itself, to see whose fault it is."""
        try:
            self._decode_together(jobs)
        except BackendError:
            _log.warning("A step of %d requests failed: trying each by itself", len(jobs), exc_info=True)
            self._forget_free_rows()
            for job in jobs:
                with self._blamed_on(job):
                    self._decode_together([job])

    def _decode_together(self, jobs: Sequence[Job]) -> None:
        rows = _rows(jobs)
        deepest = self._runner.deepest_guess
        guesses = {row: guess for job, row in zip(jobs, rows, strict=True) if (guess := job.sequence.guess(deepest))}
        size = self._runner.tree_size(rows, guesses)
        with self._timed("decode", len(rows), size) as tokens:
            result = self._runner.decode(rows, size, guesses)
            silent = [job for job, row in zip(jobs, rows, strict=True) if not result.count[row]]
            for job in jobs:
                if job not in silent:
                    tokens.append(self._deliver_step(job, result, size))
        for job in silent:
            with self._blamed_on(job), self._timed("decode", 1, 1) as tokens:
                tokens.append(self._deliver_step(job, self._runner.retry(_rows([job])[0]), 1))

    def _deliver_step(self, job: Job, result: StepResult, size: int) -> int:
        """Delivers what a decoding step of ``size`` nodes emitted for a request; gives the number of tokens."""
        assert job.row is not None
        emitted, logprobs = result.emitted(job.row)
        stats = job.sequence.stats
        stats.count_step(len(emitted), size)
        stats.decode_seconds = self._now() - job.first_token
        self._deliver(job, emitted, logprobs)
        return len(emitted)

    def _forget_free_rows(self) -> None:
        """Gives up what free rows hold, which may be what there is no room for."""
        with self._changed:
            for row in self._scheduler.forget():
                self._backend.reset(row)

    @contextlib.contextmanager
    def _blamed_on(self, job: Job) -> Iterator[None]:
        """Ends a request with the backend's error."""
        try:
            yield
        except BackendError as error:
            with self._changed:
                self._end(job, error)

    @contextlib.contextmanager
    def _timed(self, kind: str, rows: int, size: int) -> Iterator[list[int]]:
        """Tells of a step that didn't fail; takes what it came to."""
        tokens: list[int] = []
        started = self._now()
        yield tokens
        self._tell(self._metrics.step, kind, rows, size, sum(tokens), self._now() - started)

    def _deliver(self, job: Job, emitted: Sequence[int], logprobs: Sequence[float] | None) -> None:
        try:
            chunk = job.sequence.accept(emitted, logprobs)
        except Exception as error:  # noqa: BLE001  # a tokenizer that fails is the fault of nobody else
            failure = RequestError(f"The tokens of this request can't be made text: {error!r}.")
            failure.__cause__ = error
            with self._changed:
                self._end(job, failure)
            return
        job.handle.put(chunk)
        if job.sequence.finish_reason is not None:
            with self._changed:
                self._end(job, job.sequence.result())

    def _end(self, job: Job, outcome: GenerationResult | MedusaError) -> None:
        """Ends a request and frees its row, whose entries stay for others to take over unless the backend failed."""
        if job.row is not None:
            row, kept = job.row, 0 if isinstance(outcome, BackendError) else int(self._backend.lengths[job.row])
            self._scheduler.remove(job, kept)
            if not kept:
                self._backend.reset(row)
        else:
            self._scheduler.remove(job)
        result = outcome if isinstance(outcome, GenerationResult) else None
        self._tell(self._metrics.ended, result.finish_reason if result else type(outcome).__name__, job.sequence.stats)
        job.handle.end(outcome)
        self._changed.notify_all()

    def _now(self) -> float:
        """The clock's time, which stands still where the clock jumps back."""
        self._latest = max(self._latest, self._clock())
        return self._latest

    def _tell(self, hook: Callable[..., None], *figures: object) -> None:
        try:
            hook(*figures)
        except Exception:  # noqa: BLE001  # a stranger's code
            _log.exception("A hook for metrics failed")


def _rows(jobs: Sequence[Job]) -> list[int]:
    return [job.row for job in jobs if job.row is not None]


def _check_options(bundle: Bundle, options: ServiceOptions) -> None:
    check_integer("prefill_chunk", options.get("prefill_chunk", PREFILL_CHUNK), at_least=1)
    check_integer("max_queue", options.get("max_queue", 0), at_least=0)
    tree_size = options.get("tree_size", "auto")
    if tree_size != "auto":
        check_tree_size(bundle, tree_size)

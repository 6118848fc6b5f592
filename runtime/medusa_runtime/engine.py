"""The engine: one request at a time, in the caller's thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self, Unpack

from medusa_runtime.backends import open_backend
from medusa_runtime.backends.base import Backend
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.common.closeable import Closeable, State
from medusa_runtime.common.critical_section import CriticalSection
from medusa_runtime.common.processes import close_at_exit, keep_in_children, native_work
from medusa_runtime.decoding.latency import LatencyTable, measured_tables
from medusa_runtime.decoding.loop import DecodeLoop
from medusa_runtime.decoding.scheduler import Job
from medusa_runtime.decoding.sequence import TokenSequence, check_integer, check_tree_size
from medusa_runtime.decoding.tree_choice import TreeChoice
from medusa_runtime.errors import BackendError, MedusaError, RequestError
from medusa_runtime.generation_stream import Answer, GenerationStream
from medusa_runtime.metrics import Metrics
from medusa_runtime.request import (
    EngineOptions,
    GenerationResult,
    Prompt,
    TreeSize,
    check_names,
    generation_options,
)
from medusa_runtime.text.tokenizer import Tokenizer
from medusa_runtime.tuning import LONE_CHUNK

_OVERTAKEN = (
    "This stream's engine has begun another request: read a stream to its end first, load a second engine, or use "
    "MedusaService."
)


class MedusaEngine(Closeable):
    """Generates text from a bundle, one request at a time.

    The engine keeps the K/V entries of its last request. A prompt that begins with the same tokens, such as the next
    turn of a conversation, computes only what is new: ``stats.cached_tokens`` says how many tokens were reused.

    Threads may share an engine. ``generate`` calls run one after the other. A newer stream or answer ends an older
    stream, which then raises ``RequestError``; no call ever gets another one's tokens. ``close`` waits for the step
    that runs. All calls block, so an event loop needs ``MedusaService`` instead. In a child made by ``fork`` every call
    raises ``ForkError``. An engine that is open when the process ends is closed then.

    The constructor measures nothing. ``tree_size="auto"`` then goes by step times that an earlier measurement has kept
    in the bundle. Without these it is plain decoding, until ``measure`` is called. ``load`` calls it.

    Args:
        bundle: The bundle, checked.
        backend: The backend that runs its graph, with one row or more; the engine uses the first row. Engines may
            share a backend as long as one request ends before the next one begins.
        tokenizer: The bundle's tokenizer. If it is None, prompts are token ids, and so are answers.
    """

    def __init__(self, bundle: Bundle, backend: Backend, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        self.bundle = bundle
        self.backend = backend
        self.tokenizer = tokenizer
        kept = None if bundle.acceptance.drafts_are_useless else LatencyTable.kept(bundle, backend, backend.rows)
        self._loop = DecodeLoop(
            bundle,
            backend,
            choice=None if kept is None else TreeChoice(bundle.acceptance, bundle.tree, {backend.rows: kept}),
            metrics=Metrics(),
            clock=time.perf_counter,
        )
        self._closed = False
        self._failure: Exception | None = None
        self._turn = 0  # the number of the newest stream, which may use the backend
        self._interrupted = False  # an exception that is no ``Exception``, such as KeyboardInterrupt, left a step
        self._requests = threading.RLock()  # held while a request begins, and by ``generate`` to its end
        self._backend_use = CriticalSection("This engine")
        keep_in_children(backend)
        close_at_exit(self)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = "auto",
        *,
        threads: int | None = None,
        check_digests: bool = True,
        measure: bool = True,
        device: int = 0,
    ) -> Self:
        """Opens a bundle.

        The first time on a machine, this measures steps of all tree sizes, which takes a few seconds for a model of a
        hundred million weights. The figures are kept in the bundle, if its folder can be written to. Nothing is
        measured if the heads are untrained, as trees gain nothing then.

        Args:
            bundle: The folder that ``medusa-export onnx`` or ``medusa-export trt`` wrote.
            backend: ``onnxruntime`` (on the CPU), ``onnxruntime-cuda``, the flavor of a compiled engine (``tensorrt``,
                ``tensorrt-rtx``), or ``auto`` for the best one that the folder and this machine allow.
            threads: CPU threads of one step; None for all that this process may use.
            check_digests: If True, all files are read and their digests are compared.
            measure: If False, nothing is measured. This is for callers that give each request a tree size of its own;
                see the class for ``auto``.
            device: Number of the GPU that runs a compiled engine, among those that CUDA sees.

        Raises:
            BundleError: The bundle can't be used; the message says why.
            BackendError: The backend is unknown or not installed, it can't load the graph, or the graph failed.
            RequestError: ``threads`` is not a positive integer, or ``device`` not an integer of at least 0.
        """
        threads = None if threads is None else check_integer("threads", threads, at_least=1)
        with native_work():
            checked = Bundle.load(bundle, check_digests=check_digests)
            tokenizer = Tokenizer.load(checked.listed)
            number = check_integer("device", device, at_least=0)
            opened = open_backend(backend, checked, threads=threads, check_digests=check_digests, device=number)
            try:
                engine = cls(checked, opened, tokenizer)
                if measure:
                    engine.measure()
            except BaseException:
                opened.close()
                raise
            return engine

    def measure(self) -> None:
        """Measures the steps that ``tree_size="auto"`` chooses from, unless the bundle has figures of this machine.

        A stream that is not read to its end is ended.

        Raises:
            RequestError: The engine is closed, or this call interrupts a step in the same thread.
            BackendError: The graph failed, or there is no memory.
        """
        self.check_process()
        self._backend_use.check()
        with self._requests, native_work():
            turn = self._turn = self._turn + 1
            with self._using_backend(turn):
                self._end_stream()
                self._loop.evict()
                tables = measured_tables(self.bundle, self.backend)
                self._loop.sizes.choice = TreeChoice(self.bundle.acceptance, self.bundle.tree, tables)

    def evict(self) -> None:
        """Gives up the entries of earlier requests, so that the next prompt is computed in full.

        Measurements and checks need that. A stream that runs goes on.

        Raises:
            RequestError: The engine is closed, or this call interrupts a step in the same thread.
        """
        self.check_process()
        self._backend_use.check()
        with self._using_backend(self._turn):
            self._loop.evict()

    def generate(self, prompt: Prompt, **options: Unpack[EngineOptions]) -> GenerationResult:
        """Answers a prompt.

        Args:
            prompt: Text, chat messages (``{"role": …, "content": …}``, one or a list), or token ids.
            options: See ``EngineOptions``: ``max_new_tokens``, ``stop``, ``stop_token_ids``, ``sampling``,
                ``logprobs``, ``lookup``, ``tree_size`` and ``prefill_chunk``.

        Raises:
            RequestError: The request can't be served; the message says why.
            BackendError: The graph failed, or there is no room for prompt and answer.
        """
        self.check_process()
        with self._requests:
            return self.stream(prompt, **options).result()

    def stream(self, prompt: Prompt, **options: Unpack[EngineOptions]) -> GenerationStream:
        """Answers a prompt piece by piece: iterate over the chunks. Arguments and errors are those of ``generate``.

        The request is checked at once, before the first chunk is asked for. The engine serves one stream at a time: a
        newer one ends it, and it then raises ``RequestError``. While another thread is in ``generate``, this waits for
        that answer.
        """
        check_names(options, EngineOptions)
        self.check_process()
        with native_work():
            sequence = TokenSequence.of(self.bundle, self.tokenizer, prompt, **generation_options(options))
        chunk = check_integer("prefill_chunk", options.get("prefill_chunk", LONE_CHUNK), at_least=1)
        size = options.get("tree_size", "auto")
        size = size if size == "auto" else check_tree_size(self.bundle, size)
        self._loop.check(sequence, size)
        answer = Answer()
        job = Job(sequence, answer)
        with self._requests:
            turn = self._begin(job, answer, size, chunk)
        return GenerationStream(job, answer, self, turn)

    def _begin(self, job: Job, answer: Answer, tree_size: TreeSize, prefill_chunk: int) -> int:
        """Ends the stream that runs, and gives the row to a request.

        Returns:
            The number of the turn, which the stream needs for its steps.
        """
        self._backend_use.check()
        # An older stream loses its turn at once: else it might run another step before this thread gets the backend.
        turn = self._turn = self._turn + 1
        with self._using_backend(turn):
            self._end_stream()
            loop = self._loop
            loop.sizes.tree_size = tree_size
            loop.prefill_chunk = loop.lone_chunk = prefill_chunk
            loop.reset_error = None
            loop.submit(job)
            job.sequence.stats.queue_seconds = 0.0
            self._failure = _cause(answer.error) if isinstance(answer.error, BackendError) else None
            if answer.error is not None:
                raise answer.error
        return turn

    def _end_stream(self) -> None:
        """Ends the stream that has the row, if there is one. The row keeps its entries, unless a step was torn."""
        if self._interrupted and not self._loop.scheduler.is_idle:
            self._loop.recover(RequestError(_OVERTAKEN))
        self._interrupted = False
        self._loop.end_all(RequestError(_OVERTAKEN))

    def advance(self, job: Job, turn: int) -> None:
        """Runs one step of a stream. ``GenerationStream`` calls it.

        Args:
            job: The stream's request.
            turn: The number of the stream's turn.

        Raises:
            RequestError: The engine is closed, it has begun another request, or this call interrupts a step.
        """
        with self._using_backend(turn):
            if job.sequence.prefilled == job.sequence.stats.cached_tokens:
                job.admitted = time.perf_counter()  # prefill begins when the first chunk is asked for
            try:
                self._loop.step()
            except Exception as error:  # noqa: BLE001  # the stream raises it, as the end of its request
                self._loop.recover(error)
            except BaseException:
                self._interrupted = True
                raise
            if self._loop.reset_error is not None:
                self._failure = _cause(self._loop.reset_error)

    @contextlib.contextmanager
    def _using_backend(self, turn: int) -> Iterator[None]:
        """Keeps other threads from the backend.

        Raises:
            RequestError: The engine is closed, it has begun another request, or this call interrupts a step.
            BackendError: The block raised something else than an error of this project.
        """
        with self._backend_use.entered():
            try:
                self._check_turn(turn)
                yield
            except MedusaError:
                raise
            except Exception as error:
                raise BackendError(f"A step failed: {error!r}.") from error
            finally:
                if self._closed:  # by a call that has interrupted the step
                    self.backend.close()

    def _check_turn(self, turn: int) -> None:
        if self._closed:
            raise RequestError("This engine is closed: load another.")
        if turn != self._turn:
            raise RequestError(_OVERTAKEN)

    @property
    def state(self) -> State:
        """``ready``, ``closed``, or ``failed``: the backend failed and could not be reset, or this is a forked child.

        A failed engine tries again with the next request.
        """
        if self.failure is not None:
            return "failed"
        return "closed" if self._closed else "ready"

    @property
    def failure(self) -> Exception | None:
        """The reason for the state ``failed``; None in other states."""
        return self.fork_error if self.in_forked_child else self._failure

    def close(self) -> None:
        """Gives the backend's memory back, once the step that runs has ended. A stream that is left fails."""
        self.check_process()
        self._closed = True
        self._turn += 1
        with contextlib.suppress(RequestError), self._backend_use.entered():
            self.backend.close()  # else this call interrupts a step of this thread, which closes it at its end


def _cause(error: BackendError) -> Exception:
    """The exception of a backend that an error of this project stands for."""
    return error.__cause__ if isinstance(error.__cause__, Exception) else error

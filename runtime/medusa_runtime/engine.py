"""The engine: one request at a time, drafted, verified and accepted step by step."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from medusa_runtime.backends import open_backend
from medusa_runtime.backends.base import Backend, StepResult
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.common.closeable import Closeable, State
from medusa_runtime.common.critical_section import CriticalSection
from medusa_runtime.common.processes import ProcessBound, close_at_exit, keep_in_children, native_work
from medusa_runtime.decoding.latency import LatencyTable
from medusa_runtime.decoding.retry import retried
from medusa_runtime.decoding.sequence import TokenSequence, check_integer, check_tree_size
from medusa_runtime.decoding.steps import decoding_steps, guided_steps
from medusa_runtime.decoding.tree_choice import TreeChoice, TreeSize
from medusa_runtime.errors import BackendError, MedusaError, RequestError
from medusa_runtime.request import Chunk, GenerationResult, Prompt, Stats
from medusa_runtime.sampling import SamplingParams
from medusa_runtime.text.tokenizer import Tokenizer

PREFILL_CHUNK = 512
# The tokens of a step, and their log probabilities.
Emitted = tuple[list[int], list[float] | None]


class MedusaEngine(Closeable):
    """Generates text from a bundle, one request at a time.

    Threads may share an engine. ``generate`` calls run one after the other. A newer stream or answer ends an older
    stream, which then raises ``RequestError``; no call ever gets another one's tokens. ``close`` waits for the step
    that runs. All calls block, so an event loop needs ``MedusaService`` instead. In a child made by ``fork`` every call
    raises ``ForkError``. An engine that is open when the process ends is closed then.

    Args:
        bundle: The bundle, checked.
        backend: What runs its graph.
        tokenizer: Its tokenizer, or None if it has none: then prompts are token ids and results too.
    """

    def __init__(self, bundle: Bundle, backend: Backend, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        self.bundle = bundle
        self.backend = backend
        self.tokenizer = tokenizer
        self._choice: TreeChoice | None = None
        self._closed = False
        self._failure: Exception | None = None
        self._turn = 0  # counts who may use the backend: the newest stream
        self._requests = threading.RLock()  # held by who begins a request, and by ``generate`` to its end
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
    ) -> Self:
        """Opens a bundle.

        Args:
            bundle: The folder that ``medusa-export onnx`` or ``medusa-export trt`` wrote.
            backend: ``onnxruntime`` (on the CPU), ``onnxruntime-cuda``, the flavor of a compiled engine (``tensorrt``,
                ``tensorrt-rtx``), or ``auto`` for the best that the folder and this machine have.
            threads: CPU threads of one step; all that this process may use if None.
            check_digests: Read all files to compare their digests.

        Raises:
            BundleError: The bundle can't be served; the message says why.
            BackendError: The backend is unknown or not installed, or it can't load the graph.
            RequestError: ``threads`` is no number of threads.
        """
        threads = None if threads is None else check_integer("threads", threads, at_least=1)
        with native_work():
            checked = Bundle.load(bundle, check_digests=check_digests)
            tokenizer = Tokenizer.load(checked.listed)
            return cls(checked, open_backend(backend, checked, threads=threads, check_digests=check_digests), tokenizer)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        tree_size: TreeSize = "auto",
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        sampling: SamplingParams | None = None,
        logprobs: bool = False,
        lookup: bool = True,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> GenerationResult:
        """Answers a prompt.

        Args:
            prompt: Text, chat messages (``{"role": …, "content": …}``, one or a list), or token ids.
            max_new_tokens: Tokens to generate at most.
            tree_size: Nodes to verify per step, from 1 (plain decoding) to the bundle's tree; ``auto``
                takes in each step the size with the best expected speed on this machine. It never changes the result,
                but for that of typical acceptance.
            stop: Strings that end the text; they are not part of it. A special token in one, such as
                ``<|im_start|>``, is matched by that token.
            stop_token_ids: Tokens that end it, besides the model's own.
            sampling: How to draw tokens; greedy if None.
            logprobs: Give log probabilities.
            lookup: Also guess what followed the last tokens when the text had them before. It never changes the
                result, and is not done under typical acceptance, where it would.
            prefill_chunk: Tokens of the prompt that one step takes in.

        Raises:
            RequestError: The request can't be served as it stands.
            BackendError: The graph failed.
        """
        self.check_process()
        with self._requests:
            stream = self.stream(
                prompt,
                max_new_tokens=max_new_tokens,
                tree_size=tree_size,
                stop=stop,
                stop_token_ids=stop_token_ids,
                sampling=sampling,
                logprobs=logprobs,
                lookup=lookup,
                prefill_chunk=prefill_chunk,
            )
            return stream.result()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        tree_size: TreeSize = "auto",
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        sampling: SamplingParams | None = None,
        logprobs: bool = False,
        lookup: bool = True,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> GenerationStream:
        """Answers a prompt piece by piece: iterate over the chunks; arguments and errors as for ``generate``.

        The request is checked at once, before the first chunk is asked for. The engine serves one
        stream at a time: once there is a newer one, the one before raises ``RequestError``. While another thread is in
        ``generate``, this waits for its answer.
        """
        self.check_process()
        with native_work():
            sequence = TokenSequence.of(
                self.bundle,
                self.tokenizer,
                prompt,
                max_new_tokens=max_new_tokens,
                stop=stop,
                stop_token_ids=stop_token_ids,
                sampling=sampling,
                logprobs=logprobs,
                lookup=lookup,
            )
        prefill_chunk = check_integer("prefill_chunk", prefill_chunk, at_least=1)
        tree_size = tree_size if tree_size == "auto" else check_tree_size(self.bundle, tree_size)
        with self._requests:
            turn, choice = self._begin(sequence, tree_size)
        return GenerationStream(sequence, self._in_turn(self._steps(sequence, choice, prefill_chunk), turn), self)

    def _begin(self, sequence: TokenSequence, tree_size: TreeSize) -> tuple[int, TreeChoice]:
        """Empties the row for a request; gives its turn, and how it chooses trees."""
        self._backend_use.check()
        # What used the backend before loses its turn at once: else it might go on before this thread gets hold of it.
        turn = self._turn = self._turn + 1
        with self._using_backend(turn):
            try:
                choice = self._auto() if tree_size == "auto" else TreeChoice.fixed(self.bundle, tree_size)
                self.backend.reset(0)
                self.backend.assign(0, sequence.draws)
            except Exception as error:
                self._failure = error
                raise
            self._failure = None
            return turn, choice

    def _in_turn(self, steps: Iterator[Emitted | None], turn: int) -> Iterator[Emitted]:
        """Runs each step while no other thread uses the backend, and as long as it is this stream's turn."""
        while True:
            with self._using_backend(turn):
                try:
                    emitted = next(steps)
                except Exception:
                    self._check_backend()
                    raise
            if emitted is not None:
                yield emitted

    @contextlib.contextmanager
    def _using_backend(self, turn: int) -> Iterator[None]:
        """Keeps other threads from the backend.

        Raises:
            RequestError: The engine is closed, it has begun another request, or this call interrupts a step.
            BackendError: What the block raised, if it is no error of this project.
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

    def _check_backend(self) -> None:
        """Finds out after a failure whether the backend is still of use."""
        try:
            self.backend.reset(0)
        except Exception as error:  # noqa: BLE001  # it says so to whoever asks for the state
            self._failure = error

    def _steps(self, sequence: TokenSequence, choice: TreeChoice, prefill_chunk: int) -> Iterator[Emitted | None]:
        """What steps emit, without end: a token at the end of prefill, at least one from every decoding step.

        None stands for a chunk of the prompt that is not the last one.
        """
        backend, depth, stats = self.backend, self.bundle.tree.max_depth, sequence.stats
        length = len(sequence.prompt_ids)
        drafting = min(choice.largest, self.bundle.drafting_size)  # what the last chunk is padded to
        limit = min(prefill_chunk, backend.max_tokens or prefill_chunk)
        last = (length - 1) % limit + 1
        # The last step of the prompt, and the last one of all, which begins with two tokens less than there will be.
        prefilled = length - last + max(last, drafting)
        backend.reserve(depth + max(prefilled, length + sequence.max_new_tokens - 2 + choice.largest))
        started = time.perf_counter()
        while sequence.is_prefilling:
            chunk = sequence.next_chunk(limit)
            result = backend.step(max(len(chunk), drafting), {0: chunk})
            if not result.count[0]:
                result = self._retried({0: chunk})
            sequence.prefilled += len(chunk)
            if sequence.is_prefilling:
                yield None
        stats.prefill_seconds = time.perf_counter() - started
        yield result.emitted(0)
        started = time.perf_counter()
        most = min(choice.largest, depth + 1)  # tokens that a step emits
        choice.begin(0)
        if sequence.looks_up and most > 1:
            steps = guided_steps(backend, choice, lambda: sequence.guess(most - 1), self.bundle.tree, self._retried)
        else:
            steps = decoding_steps(backend, choice, lambda: sequence.tokens_left > most, self._retried)
        for step in steps:
            emitted = step.result.emitted(0)
            choice.observe(step.size, {0: len(emitted[0])}, [0] if step.guessed else [])
            stats.count_step(len(emitted[0]), step.size)
            stats.decode_seconds = time.perf_counter() - started
            yield emitted

    def _retried(self, prompts: Mapping[int, Sequence[int]] | None = None) -> StepResult:
        """A step of the row's chunk alone, or a plain step, after one that emitted nothing."""
        size = len(prompts[0]) if prompts else 1
        return retried(self.backend, 0, self.bundle.dtype, lambda: self.backend.step(size, prompts))

    def _check_turn(self, turn: int) -> None:
        if self._closed:
            raise RequestError("This engine is closed: load another.")
        if turn != self._turn:
            raise RequestError(
                "This stream's engine has begun another request: read a stream to its end first, load a second engine, "
                "or use MedusaService."
            )

    def _auto(self) -> TreeChoice:
        if self._choice is None:
            self._choice = self._measured()
        return self._choice

    def _measured(self) -> TreeChoice:
        """What has the most expected tokens per second on this machine."""
        if self.bundle.acceptance.hopeless:
            return TreeChoice.fixed(self.bundle, 1)
        table = LatencyTable.measured(self.bundle, self.backend)
        return TreeChoice(self.bundle.acceptance, self.bundle.tree, {1: table})

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
        """Why the state is ``failed``; None if it is not."""
        return self.fork_error if self.in_forked_child else self._failure

    def close(self) -> None:
        """Gives the backend's memory back, once the step that runs has ended; a stream that is left fails."""
        self.check_process()
        self._closed = True
        self._turn += 1
        with contextlib.suppress(RequestError), self._backend_use.entered():
            self.backend.close()  # else this call interrupts a step of this thread, which closes it at its end


class GenerationStream(Iterator[Chunk], ProcessBound):
    """A running request: iterate over it for chunks; ``result()`` runs it to its end.

    Threads may share it: each chunk goes to one of them. Its calls block, as those of its engine. In a child made by
    ``fork`` they raise ``ForkError``.

    Args:
        sequence: The request.
        steps: What its steps emit.
        engine: Who runs them.
    """

    def __init__(self, sequence: TokenSequence, steps: Iterator[Emitted], engine: ProcessBound) -> None:
        super().__init__()
        self._sequence = sequence
        self._steps = steps
        self._engine = engine
        self._reading = CriticalSection("This stream")
        self._failure: Exception | None = None  # what ended it early

    @property
    def finish_reason(self) -> str | None:
        """``stop`` or ``length`` once it has ended, else None."""
        return self._sequence.finish_reason

    @property
    def stats(self) -> Stats:
        """How it goes."""
        return self._sequence.stats

    def __next__(self) -> Chunk:
        if self.finish_reason is not None:
            raise StopIteration
        self._engine.check_process()
        with self._reading.entered():
            if self.finish_reason is not None:  # by another thread, for which this one has waited
                raise StopIteration
            if self._failure is not None:
                raise self._failure
            try:
                return self._sequence.accept(*next(self._steps))
            except Exception as error:
                self._failure = error
                raise
            except BaseException:
                self._failure = RequestError("This stream was interrupted: begin another.")
                raise

    def result(self) -> GenerationResult:
        """Runs to the end and gives the whole."""
        while self.finish_reason is None:
            next(self, None)
        return self._sequence.result()

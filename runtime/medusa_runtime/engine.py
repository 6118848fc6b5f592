"""The engine: one request at a time, drafted, verified and accepted step by step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from medusa_runtime.backends import open_backend
from medusa_runtime.backends.base import Backend, StepResult, can_step_ahead
from medusa_runtime.bundle import Bundle
from medusa_runtime.closing import Closing
from medusa_runtime.errors import RequestError
from medusa_runtime.latency import LatencyTable
from medusa_runtime.request import Chunk, GenerationResult, Prompt, Stats
from medusa_runtime.retry import retried
from medusa_runtime.sampling import SamplingParams
from medusa_runtime.sequence import TokenSequence, check_integer, check_tree_size
from medusa_runtime.tokenizer import Tokenizer
from medusa_runtime.tree import Tree
from medusa_runtime.tree_choice import TreeChoice, TreeSize

PREFILL_CHUNK = 512
# The tokens of a step, and their log probabilities.
Emitted = tuple[list[int], list[float] | None]


class Step(NamedTuple):
    """A decoding step: the nodes that it verified, whether there was a guess from the text, and what came of it."""

    size: int
    guessed: bool
    result: StepResult


class MedusaEngine(Closing):
    """Generates text from a bundle.

    Args:
        bundle: The bundle, checked.
        backend: What runs its graph.
        tokenizer: Its tokenizer, or None if it has none: then prompts are token ids and results too.
    """

    def __init__(self, bundle: Bundle, backend: Backend, tokenizer: Tokenizer | None) -> None:
        self.bundle = bundle
        self.backend = backend
        self.tokenizer = tokenizer
        self._choice: TreeChoice | None = None
        self._closed = False
        self._turn = 0  # counts who may use the backend: the newest stream

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
        """
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
        stream at a time: once there is a newer one, the one before raises ``RequestError``.
        """
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
        check_integer("prefill_chunk", prefill_chunk, at_least=1)
        if tree_size != "auto":
            check_tree_size(self.bundle, tree_size)
        if self._closed:
            raise RequestError("This engine is closed: load another.")
        self._turn += 1  # from here on the backend is no more what a stream before this one left
        choice = self._auto() if tree_size == "auto" else TreeChoice.fixed(self.bundle, tree_size)
        self.backend.reset(0)
        self.backend.assign(0, sequence.draws)
        return GenerationStream(sequence, self._steps(sequence, choice, prefill_chunk, self._turn))

    def _steps(self, sequence: TokenSequence, choice: TreeChoice, prefill_chunk: int, turn: int) -> Iterator[Emitted]:
        """What steps emit, without end: prefill gives one token, every step after it at least one."""
        backend, depth, stats = self.backend, self.bundle.tree.max_depth, sequence.stats
        length = len(sequence.prompt_ids)
        drafting = min(choice.largest, self.bundle.drafting_size)  # what the last chunk is padded to
        limit = min(prefill_chunk, backend.max_tokens or prefill_chunk)
        last = (length - 1) % limit + 1
        # The last step of the prompt, and the last one of all, which begins with two tokens less than there will be.
        prefilled = length - last + max(last, drafting)
        self._check_turn(turn)
        backend.reserve(depth + max(prefilled, length + sequence.max_new_tokens - 2 + choice.largest))
        started = time.perf_counter()
        while sequence.is_prefilling:
            self._check_turn(turn)
            chunk = sequence.next_chunk(limit)
            result = backend.step(max(len(chunk), drafting), {0: chunk})
            if not result.count[0]:
                result = self._retried({0: chunk})
            sequence.prefilled += len(chunk)
        stats.prefill_seconds = time.perf_counter() - started
        yield result.emitted(0)
        self._check_turn(turn)
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
            self._check_turn(turn)

    def _retried(self, prompts: Mapping[int, Sequence[int]] | None = None) -> StepResult:
        """A step of the row's chunk alone, or a plain step, after one that emitted nothing."""
        size = len(prompts[0]) if prompts else 1
        return retried(self.backend, 0, self.bundle.dtype, lambda: self.backend.step(size, prompts))

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise RequestError(
                "This stream's engine has been closed or has begun another request: read a stream to its end first, "
                "or load a second engine."
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

    def close(self) -> None:
        """Gives the backend's memory back."""
        self._turn += 1
        self._closed = True
        self.backend.close()


def decoding_steps(
    backend: Backend, choice: TreeChoice, is_sure: Callable[[], bool], retry: Callable[[], StepResult]
) -> Iterator[Step]:
    """Decoding steps without end; where the backend can, each is submitted before the one before it is looked at.

    So the device never waits for the host. A step that turns out to come after a stop is in vain, and discarded when
    the row is reset.

    Args:
        backend: What runs them.
        choice: How many nodes each verifies.
        is_sure: Whether one more step will be needed after the one under way, whatever that emits, unless the text
            stops: a step ahead never goes past the tokens asked for, nor past the caches' end.
        retry: Runs a plain step after steps that emitted nothing.
    """
    if not can_step_ahead(backend):
        while True:
            yield _emitting(choice.size([0]), backend.step, retry)
    submitted: deque[int] = deque()
    while True:
        wanted = 1 + is_sure()
        while len(submitted) < wanted:
            submitted.append(choice.size([0]))
            backend.submit(submitted[-1])
        step = Step(submitted.popleft(), guessed=False, result=backend.collect())
        while not step.result.count[0] and submitted:  # the state is as it was, so the one behind it may emit
            step = Step(submitted.popleft(), guessed=False, result=backend.collect())
        yield step if step.result.count[0] else Step(1, guessed=False, result=retry())


def guided_steps(
    backend: Backend,
    choice: TreeChoice,
    guess: Callable[[], Sequence[int]],
    tree: Tree,
    retry: Callable[[], StepResult],
) -> Iterator[Step]:
    """Decoding steps without end, each of which verifies a guess first if there is one.

    It takes the tokens of the last step to guess, so none is submitted ahead.

    Args:
        backend: What runs them.
        choice: How many nodes each verifies.
        guess: Guesses the next tokens.
        tree: The bundle's.
        retry: Runs a plain step after one that emitted nothing.
    """
    while True:
        guesses = guess()
        size = choice.size([0], [0] if guesses else [])
        tree.insert(guesses, backend.drafts[0], size)
        yield _emitting(size, backend.step, retry, guessed=bool(guesses))


def _emitting(
    size: int, run: Callable[[int], StepResult], retry: Callable[[], StepResult], *, guessed: bool = False
) -> Step:
    """A step of ``size`` nodes, or a plain one if that emits nothing."""
    result = run(size)
    return Step(size, guessed, result) if result.count[0] else Step(1, guessed=False, result=retry())


class GenerationStream(Iterator[Chunk]):
    """A running request: iterate over it for chunks; ``result()`` runs it to its end."""

    def __init__(self, sequence: TokenSequence, steps: Iterator[Emitted]) -> None:
        self._sequence = sequence
        self._steps = steps
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
        for _ in self:
            pass
        return self._sequence.result()

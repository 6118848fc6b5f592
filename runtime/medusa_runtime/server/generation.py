"""The answers to one HTTP request while they are generated: their parts as they come, and their figures."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from medusa_runtime.errors import MedusaError
from medusa_runtime.handle import RequestHandle
from medusa_runtime.request import Chunk, GenerationResult, RankedToken, Stats
from medusa_runtime.server.output.parts import Arguments, Call, Content, OutputParser, Part, Reasoning
from medusa_runtime.server.schema.answers import FinishReason, Usage


@dataclass
class Choice:
    """An answer that a request asks for, while it is generated.

    Attributes:
        index: Its index.
        prompt: Index of its prompt.
        handle: The service's handle.
        parser: The parser of its text.
        reasoning_tokens: Tokens of steps that gave reasoning alone.
        calls: Number of its tool calls so far.
    """

    index: int
    prompt: int
    handle: RequestHandle
    parser: OutputParser
    reasoning_tokens: int = 0
    calls: int = 0

    def ready(self) -> Iterator[Delta]:
        """Yields a delta of all steps since the last call, and at the end one with the result.

        Raises:
            MedusaError: The answer ended with an error.
        """
        has_ended = self.handle.done  # before the chunks are taken, as none comes behind the end
        chunks = self.handle.take()
        if chunks:
            steps = [Step(self._fed(chunk), len(chunk.token_ids)) for chunk in chunks]
            token_ids = [token for chunk in chunks for token in chunk.token_ids]
            logprobs = [value for chunk in chunks for value in chunk.logprobs or ()]
            top = [place for chunk in chunks for place in chunk.top_logprobs or ()]
            yield Delta(
                self,
                steps,
                token_ids,
                None if chunks[0].logprobs is None else logprobs,
                None if chunks[0].top_logprobs is None else top,
            )
        if has_ended:
            yield Delta(self, [Step(self._counted(self.parser.finish()))], result=self.handle.result(0))

    async def whole(self) -> Delta:
        """The complete answer."""
        result = await self.handle.aresult()
        steps = [Step(self._fed(chunk), len(chunk.token_ids)) for chunk in self.handle.take()]
        steps.append(Step(self._counted(self.parser.finish())))
        return Delta(self, steps, result.token_ids, result.logprobs, result.top_logprobs, result)

    def _fed(self, chunk: Chunk) -> list[Part]:
        parts = self._counted(self.parser.feed(chunk.text))
        if parts and all(isinstance(part, Reasoning) for part in parts):
            self.reasoning_tokens += len(chunk.token_ids)
        return parts

    def _counted(self, parts: Iterator[Part]) -> list[Part]:
        found = list(parts)
        self.calls += sum(isinstance(part, Call) for part in found)
        return found


@dataclass(frozen=True)
class Step:
    """The part of an answer that one decoding step adds.

    Attributes:
        parts: Its text, in parts of one kind each.
        count: The number of its tokens.
    """

    parts: Sequence[Part]
    count: int = 0


@dataclass(frozen=True)
class Delta:
    """The part of an answer that some decoding steps add, or a complete answer.

    Attributes:
        choice: The answer.
        steps: The part that each step adds.
        token_ids: The tokens of these steps.
        logprobs: Their log probabilities, if they were asked for.
        top_logprobs: The most likely tokens in their places, if they were asked for.
        result: The result, at the end.
    """

    choice: Choice
    steps: Sequence[Step]
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] | None = None
    top_logprobs: Sequence[Sequence[RankedToken]] | None = None
    result: GenerationResult | None = None

    @property
    def parts(self) -> list[Part]:
        """The parts of its text."""
        return [part for step in self.steps for part in step.parts]

    @property
    def content(self) -> str:
        """The text of its content."""
        return "".join(part.text for part in self.parts if isinstance(part, Content))

    @property
    def reasoning(self) -> str:
        """The text of its reasoning."""
        return "".join(part.text for part in self.parts if isinstance(part, Reasoning))

    @property
    def calls(self) -> list[Call]:
        """Its tool calls. Those of a complete answer are whole."""
        found: list[Call] = []
        for part in self.parts:
            if isinstance(part, Call):
                found.append(part)
            elif isinstance(part, Arguments) and found:
                found[-1] = Call(found[-1].name, found[-1].arguments + part.text)
        return found

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer has ended; None before."""
        if self.result is None:
            return None
        if self.choice.calls and self.result.finish_reason == "stop":
            return "tool_calls"
        return "length" if self.result.finish_reason == "length" else "stop"


@dataclass
class Generation:
    """The answers to one request. At its end it cancels those that still run.

    Attributes:
        choices: The answers.
        at_end: What to do at the end.
    """

    choices: Sequence[Choice]
    at_end: ExitStack = field(repr=False)

    async def whole(self) -> list[Delta]:
        """The complete answers."""
        return [await choice.whole() for choice in self.choices]

    async def deltas(self, quiet_seconds: float) -> AsyncGenerator[list[Delta]]:
        """Yields lists of deltas, as steps end: one delta per answer, and one more at the answer's end.

        A delta holds all steps of an answer since the last list.

        Args:
            quiet_seconds: Seconds without a step after which an empty list is yielded.

        Raises:
            MedusaError: An answer ended with an error.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            if not changed.is_set():  # then the loop will look at all answers, and need not be woken for each
                with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits in it
                    loop.call_soon_threadsafe(changed.set)

        left = list(self.choices)
        with ExitStack() as stack:
            for choice in left:
                choice.handle.listen(notify)
                stack.callback(choice.handle.unlisten, notify)
            while left:
                try:
                    async with asyncio.timeout(quiet_seconds):
                        await changed.wait()
                except TimeoutError:
                    yield []
                    continue
                changed.clear()  # before the answers are read, so that no change is missed
                found, failure = _ready(left)
                if found:
                    yield found
                if failure is not None:
                    raise failure
                ended = {delta.choice.index for delta in found if delta.result is not None}
                left = [choice for choice in left if choice.index not in ended]

    @property
    def usage(self) -> Usage:
        """Numbers of tokens so far. A prompt counts once, however many answers it has."""
        firsts = {choice.prompt: choice.handle.stats for choice in reversed(self.choices)}.values()
        stats = [choice.handle.stats for choice in self.choices]
        prompt = sum(of.prompt_tokens for of in firsts)
        completion = sum(of.completion_tokens for of in stats)
        accepted = sum(map(accepted_drafts, stats))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(of.cached_tokens for of in firsts)},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.reasoning_tokens for choice in self.choices),
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": max(0, sum(map(drafted, stats)) - accepted),
            },
        }

    def close(self) -> None:
        """Cancels the answers that still run."""
        self.at_end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ready(choices: Sequence[Choice]) -> tuple[list[Delta], MedusaError | None]:
    """Returns the new deltas of some answers, and the error that ended one of them."""
    found: list[Delta] = []
    try:
        for choice in choices:
            for delta in choice.ready():
                found.append(delta)  # noqa: PERF402  # what comes before an error is kept
    except MedusaError as error:
        return found, error
    return found, None


def accepted_drafts(stats: Stats) -> int:
    """Drafted tokens that steps of a request accepted."""
    return sum((length - 1) * times for length, times in list(stats.accepted_lengths.items()))


def drafted(stats: Stats) -> int:
    """Drafted tokens that steps of a request verified."""
    return sum((size - 1) * times for size, times in list(stats.tree_sizes.items()))

"""The options of a request, and its answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.constraints.options import Constraints
from medusa_runtime.sampling import SamplingParams

# Text; token ids, as a sequence or an array of integers; the messages of a chat; or one message.
Prompt = str | Sequence[int] | NDArray[np.integer[Any]] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
# Nodes that a step verifies: a fixed number, or "auto" for the number with the best expected speed.
TreeSize = int | Literal["auto"]


class GenerationOptions(TypedDict, total=False):
    """Options that every request has. Each may be left out.

    Attributes:
        max_new_tokens: The most tokens to generate. Default: 128.
        stop: Strings that end the text. They are not part of it. A string may contain special tokens, such as
            ``<|im_start|>``: each matches that token, and its name in the text. Default: none.
        stop_token_ids: Token ids that end the text, besides the model's own. Default: none.
        sampling: Sampling parameters. Default: None, which is greedy decoding.
        constraints: Biases, bans, penalties and a grammar for the answer's tokens. Default: None.
        logprobs: If True, the answer has log probabilities. Default: False.
        top_logprobs: Number of most likely tokens to give for the place of each token, up to 20. Above 0 it needs
            ``logprobs``. Default: 0.
        lookup: If True, steps also verify the tokens that followed when the text had the same last tokens before.
            This never changes the answer. It is off under typical acceptance, where it would. Default: True.
        ignore_eos: If True, the model's own end-of-text tokens don't end the text. Default: False.
        shown_token_ids: Special tokens that are part of the text, such as marks of tool calls. The text leaves out all
            other special tokens. Default: none.
    """

    max_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    sampling: SamplingParams | None
    constraints: Constraints | None
    logprobs: bool
    top_logprobs: int
    lookup: bool
    ignore_eos: bool
    shown_token_ids: Sequence[int]


class EngineOptions(GenerationOptions, total=False):
    """Options of a request to an engine: those of ``GenerationOptions``, and these.

    Attributes:
        tree_size: Nodes that each step verifies, from 1 (plain decoding) to the size of the bundle's tree. ``auto``
            chooses for each step the size with the best expected speed on this machine. It never changes the answer,
            except under typical acceptance. Default: ``auto``.
        prefill_chunk: The most tokens of the prompt that one step takes in. Default: 512.
    """

    tree_size: TreeSize
    prefill_chunk: int


class RequestOptions(GenerationOptions, total=False):
    """Options of a request to a service: those of ``GenerationOptions``, and these.

    Attributes:
        priority: Requests with a higher priority get a row first. Default: 0.
        timeout: Seconds after submission at which the request ends with ``DeadlineError``, whether it waits or runs.
            Default: None, which is no limit.
    """

    priority: int
    timeout: float | None


def check_names(given: Mapping[str, Any], known: type) -> None:
    """Raises ``TypeError`` if a request has an option of another name than those of a ``TypedDict``."""
    names = known.__annotations__
    unknown = given.keys() - names.keys()
    if unknown:
        raise TypeError(f"There is no option {min(unknown)!r}: a request has {', '.join(names)}.")


def generation_options(options: GenerationOptions) -> GenerationOptions:
    """The options of ``GenerationOptions`` among those of a request."""
    names = GenerationOptions.__annotations__
    return cast("GenerationOptions", {name: value for name, value in options.items() if name in names})


@dataclass
class Stats:
    """Figures of one request.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Tokens of the prompt whose entries were in a cache already. They were not computed again.
        completion_tokens: Tokens generated.
        steps: Decoding steps. The first token comes from prefill and needs none.
        accepted_lengths: Number of steps by the number of tokens that they emitted.
        tree_sizes: Number of steps by the number of nodes that they verified.
        queue_seconds: Seconds from submission until the request got a row. 0 in an engine, which has no queue.
        prefill_seconds: Seconds from getting the row until the first token.
        decode_seconds: Seconds from the first token to the last.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    accepted_lengths: Counter[int] = field(default_factory=Counter)
    tree_sizes: Counter[int] = field(default_factory=Counter)
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def count_step(self, emitted: int, tree_size: int) -> None:
        """Counts a decoding step that verified ``tree_size`` nodes and emitted ``emitted`` tokens."""
        self.steps += 1
        self.accepted_lengths[emitted] += 1
        self.tree_sizes[tree_size] += 1

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens that a decoding step emitted; 1 if there was no step."""
        return _mean(self.accepted_lengths)

    @property
    def nodes_per_step(self) -> float:
        """Mean number of nodes that a decoding step verified; 1 if there was no step."""
        return _mean(self.tree_sizes)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed without prefill; 0 if there was no step."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.steps and self.decode_seconds else 0.0


def _mean(counts: Counter[int]) -> float:
    found = list(counts.items())  # a copy, as another thread may go on counting
    return sum(number * times for number, times in found) / sum(times for _, times in found) if found else 1.0


class RankedToken(NamedTuple):
    """A token that the base model finds likely in a place of an answer.

    Attributes:
        token_id: The token.
        logprob: Its log probability in the base model's own distribution.
    """

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Chunk:
    """The part of an answer that a step adds: its tokens, and the text that will not change any more.

    Attributes:
        text: The text.
        token_ids: The tokens.
        logprobs: The log probability of each token in the base model's own distribution, before temperature and
            cut-offs. None if the request did not ask for log probabilities.
        top_logprobs: For each token, the most likely tokens in its place, in descending order. The token itself need
            not be among them. None if the request did not ask for them.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[RankedToken, ...], ...] | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A complete answer.

    Attributes:
        text: The text without special tokens, up to a stop string. Empty if the bundle has no tokenizer.
        token_ids: The tokens, including an end-of-text token.
        finish_reason: ``stop`` (a stop token or stop string) or ``length`` (``max_new_tokens`` was reached).
        stats: Figures of the request.
        logprobs: As in ``Chunk``, for all tokens.
        top_logprobs: As in ``Chunk``, for all tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stats: Stats
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[RankedToken, ...], ...] | None = None

"""What a request asks for and what it gets back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.sampling import SamplingParams

# Text, token ids (an array of integers among them), a chat, or a single message of one.
Prompt = str | Sequence[int] | NDArray[np.integer[Any]] | Sequence[Mapping[str, Any]] | Mapping[str, Any]


class RequestOptions(TypedDict, total=False):
    """What a request to a service may ask for besides its prompt; what is left out has its default.

    Attributes:
        max_new_tokens: Tokens to generate at most; 128.
        stop: Strings that end the text and are not part of it; none. One may hold special tokens, such as
            ``<|im_start|>``, which the text leaves out; each is matched by that token, and by its name in the text.
        stop_token_ids: Tokens that end it, besides the model's own; none.
        sampling: How to draw tokens; greedy if None.
        logprobs: Whether to give log probabilities; False.
        lookup: Whether to guess also what followed the last tokens when the text had them before; True.
        priority: Requests with a higher one get a row first; 0.
        timeout: Seconds from submission until it ends with ``DeadlineError``, wherever it is; None for no limit.
    """

    max_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    sampling: SamplingParams | None
    logprobs: bool
    lookup: bool
    priority: int
    timeout: float | None


@dataclass
class Stats:
    """How a request went.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: How many of them were in a cache already, and were not computed again.
        completion_tokens: Tokens generated.
        steps: Decoding steps; the first token comes from prefill and takes none.
        accepted_lengths: How many steps emitted 1, 2, … tokens.
        tree_sizes: How many steps verified trees of 1, 2, … nodes.
        queue_seconds: Until it was its turn; 0 in an engine, which has no queue.
        prefill_seconds: From then until the first token.
        decode_seconds: From then to the last.
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
        """Notes a decoding step, how many tokens it emitted and how many nodes it verified."""
        self.steps += 1
        self.accepted_lengths[emitted] += 1
        self.tree_sizes[tree_size] += 1

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens emitted by a decoding step; 1 if there was none."""
        return _mean(self.accepted_lengths)

    @property
    def nodes_per_step(self) -> float:
        """Mean nodes verified by a decoding step; 1 if there was none."""
        return _mean(self.tree_sizes)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, prefill left out; 0 if no step was needed."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.steps and self.decode_seconds else 0.0


def _mean(counts: Counter[int]) -> float:
    found = list(counts.items())  # all at once: another thread may count on
    return sum(number * times for number, times in found) / sum(times for _, times in found) if found else 1.0


@dataclass(frozen=True)
class Chunk:
    """What one step adds to a stream: the new tokens, and the text that is final by now.

    Attributes:
        text: The text.
        token_ids: The tokens.
        logprobs: For each token log p by the base model's own distribution, before temperature and whatever else
            shapes it; None unless asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A finished request.

    Attributes:
        text: The completion without special tokens, cut before a stop string; empty without a tokenizer.
        token_ids: The completion's tokens, an end-of-text token included.
        finish_reason: ``stop`` (a stop token or string) or ``length``.
        stats: How it went.
        logprobs: As in ``Chunk``, for all tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stats: Stats
    logprobs: tuple[float, ...] | None = None

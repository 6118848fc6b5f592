"""Measures the speeds of contestants, and compares them with a baseline.

In each repeat every contestant answers every prompt, with as many tokens as the baseline. The order is shuffled for
each prompt, with a fixed seed, because threads and caches of one contestant may disturb the one after it. Speeds are
totals over prompts. Ratios are taken within a repeat, and figures are medians over repeats.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medusa_export.benchmarks.contestants import Contestant, Generation
from medusa_export.benchmarks.peer_weights import StoredWeights


@dataclass(frozen=True)
class Speed:
    """The speed of a contestant: medians over repeats.

    Attributes:
        tokens_per_second: Tokens per second, after the first token.
        spread: Tokens per second of the slowest and the fastest repeat.
        tokens_per_step: Mean number of tokens that a step emitted.
        nodes_per_step: Mean number of nodes that a step verified.
        speedup: Tokens per second divided by the baseline's.
        overhead: Seconds per step divided by the baseline's.
        first_token_seconds: Time to the first token, in seconds; also a median over prompts.
        identical: True if all tokens are the baseline's.
        memory_mib: Memory that loading and a first answer added to this process, in MiB; None if not measured. Tree
            sizes share one engine.
        weights: How it stores its weights; None if all contestants store them alike.
    """

    tokens_per_second: float
    spread: tuple[float, float]
    tokens_per_step: float
    nodes_per_step: float
    speedup: float
    overhead: float
    first_token_seconds: float
    identical: bool
    memory_mib: int | None = None
    weights: StoredWeights | None = None

    @property
    def comparable(self) -> bool:
        """True if its tokens should be the baseline's, since its weights are the same numbers."""
        return self.weights is None or self.weights.same


def race(
    contestants: Mapping[str, Contestant],
    baseline: str,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    repeats: int,
    on_prompt: Callable[[], None] = lambda: None,
) -> dict[str, list[list[Generation]]]:
    """Lets all contestants answer all prompts.

    Args:
        contestants: The contestants by name.
        baseline: The name of the one that the others are compared with.
        prompts: Token ids of each prompt.
        max_new_tokens: Largest number of tokens to generate per prompt. All generate as many as the baseline does.
        repeats: Number of times that each prompt is answered.
        on_prompt: Called when all have answered a prompt.

    Returns:
        The answers of each contestant, as [repeat][prompt].
    """
    counts = [len(contestants[baseline](prompt, max_new_tokens).token_ids) for prompt in prompts]
    names = [baseline, *(name for name in contestants if name != baseline)]
    answers: dict[str, list[list[Generation]]] = {name: [[] for _ in range(repeats)] for name in names}
    orders = random.Random(0)  # noqa: S311  # no secret
    for repeat in range(repeats):
        for prompt, count in zip(prompts, counts, strict=True):
            for name in orders.sample(names, len(names)):
                answers[name][repeat].append(contestants[name](prompt, count))
            on_prompt()
    return answers


def speeds(
    answers: Mapping[str, list[list[Generation]]],
    baseline: str,
    memory: Mapping[str, int] | None = None,
    weights: Mapping[str, StoredWeights] | None = None,
) -> dict[str, Speed]:
    """Returns the speed of each contestant.

    Args:
        answers: The answers of each contestant, as [repeat][prompt].
        baseline: The name of the contestant to compare with.
        memory: Memory of contestants in bytes, by name.
        weights: How contestants store their weights, by name.
    """
    taken, stored = memory or {}, weights or {}
    rates = {name: [_rate(repeat) for repeat in repeats] for name, repeats in answers.items()}
    step_seconds = {name: [_step_seconds(repeat) for repeat in repeats] for name, repeats in answers.items()}
    expected = [answer.token_ids for answer in answers[baseline][0]]
    return {
        name: Speed(
            tokens_per_second=statistics.median(rates[name]),
            spread=(min(rates[name]), max(rates[name])),
            tokens_per_step=statistics.median(_per_step(repeat, _tokens(repeat)) for repeat in repeats),
            nodes_per_step=statistics.median(_per_step(repeat, _nodes(repeat)) for repeat in repeats),
            speedup=_ratio(rates[name], rates[baseline]),
            overhead=_ratio(step_seconds[name], step_seconds[baseline]),
            first_token_seconds=statistics.median(a.prefill_seconds for repeat in repeats for a in repeat),
            identical=all([answer.token_ids for answer in repeat] == expected for repeat in repeats),
            memory_mib=taken[name] >> 20 if name in taken else None,
            weights=stored.get(name),
        )
        for name, repeats in answers.items()
    }


def by_category(
    answers: Mapping[str, list[list[Generation]]], categories: Sequence[str], name: str, baseline: str
) -> dict[str, dict[str, float]]:
    """Returns speedup and tokens per step of one contestant, by category.

    Args:
        answers: The answers of each contestant, as [repeat][prompt].
        categories: The category of each prompt.
        name: The name of the contestant.
        baseline: The name of the contestant to compare with.
    """
    figures = {}
    for category in dict.fromkeys(categories):
        part = {
            who: [
                [a for a, kind in zip(repeat, categories, strict=True) if kind == category] for repeat in answers[who]
            ]
            for who in {name, baseline}
        }
        speed = speeds(part, baseline)[name]
        figures[category] = {"speedup": speed.speedup, "tokens_per_step": speed.tokens_per_step}
    return figures


def _tokens(repeat: Sequence[Generation]) -> int:
    """Counts tokens after the first one of each answer."""
    return sum(len(answer.token_ids) - 1 for answer in repeat)


def _rate(repeat: Sequence[Generation]) -> float:
    return _tokens(repeat) / max(sum(answer.decode_seconds for answer in repeat), 1e-9)


def _step_seconds(repeat: Sequence[Generation]) -> float:
    return _per_step(repeat, sum(answer.decode_seconds for answer in repeat))


def _nodes(repeat: Sequence[Generation]) -> float:
    return sum(answer.steps * answer.nodes_per_step for answer in repeat)


def _per_step(repeat: Sequence[Generation], amount: float) -> float:
    return amount / max(sum(answer.steps for answer in repeat), 1)


def _ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(value / max(other, 1e-12) for value, other in zip(values, others, strict=True))

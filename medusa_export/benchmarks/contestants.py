"""Contestants of a bench: engines at several tree sizes, and what all contestants have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil

from medusa_export.benchmarks.peer_weights import StoredWeights
from medusa_runtime import MedusaEngine
from medusa_runtime.request import TreeSize


@dataclass(frozen=True)
class Generation:
    """An answer and the time that it took.

    Attributes:
        token_ids: The tokens of the answer.
        prefill_seconds: Time until the first token.
        decode_seconds: Time from the first token to the last.
        steps: Steps after the first token.
        nodes_per_step: Mean number of nodes that these steps verified.
    """

    token_ids: tuple[int, ...]
    prefill_seconds: float
    decode_seconds: float
    steps: int
    nodes_per_step: float = 1.0


# Answers a prompt greedily. Arguments: token ids of the prompt, and the number of tokens to generate. An engine stops
# earlier where its answer ends.
Contestant = Callable[[list[int], int], Generation]


def engine_contestant(engine: MedusaEngine, tree_size: TreeSize, *, lookup: bool = True) -> Contestant:
    """Returns a contestant for an engine.

    Args:
        engine: The engine. Contestants share its backend.
        tree_size: Nodes per step, or ``auto``.
        lookup: Also propose tokens by lookup in the text.
    """
    # Each contestant counts acceptance of its own, because its steps differ from those of others.
    own = MedusaEngine(engine.bundle, engine.backend, engine.tokenizer)
    if tree_size == "auto":
        own.measure()

    def answer(prompt: list[int], max_new_tokens: int) -> Generation:
        own.evict()  # each answer pays for its prompt
        result = own.generate(prompt, max_new_tokens=max_new_tokens, tree_size=tree_size, lookup=lookup)
        stats = result.stats
        return Generation(
            result.token_ids, stats.prefill_seconds, stats.decode_seconds, stats.steps, stats.nodes_per_step
        )

    return answer


class Contestants:
    """Contestants that are loaded and warmed up, with the memory that each takes.

    Args:
        prompt: Token ids of the prompt that each answers to warm up.
        max_new_tokens: Number of tokens of that answer.

    Attributes:
        by_name: The contestants by name, in the order of ``add``.
        memory: Memory that each added to this process, in bytes, by name.
        weights: How each stores its weights, by name.
    """

    def __init__(self, prompt: list[int], max_new_tokens: int) -> None:
        self._prompt, self._max_new_tokens = prompt, max_new_tokens
        self.by_name: dict[str, Contestant] = {}
        self.memory: dict[str, int] = {}
        self.weights: dict[str, StoredWeights] = {}

    def add(
        self, name: str, load: Callable[[], Contestant], weights: StoredWeights, *, since: int | None = None
    ) -> None:
        """Loads a contestant and warms it up.

        Args:
            name: Its name.
            load: Loads it.
            weights: How it stores its weights.
            since: Memory of the process before a part of the contestant was loaded, in bytes; None for the present one.
        """
        before = resident() if since is None else since
        contestant = load()
        contestant(self._prompt, self._max_new_tokens)
        self.memory[name] = resident() - before
        self.by_name[name] = contestant
        self.weights[name] = weights


def resident() -> int:
    """Returns the memory of this process, in bytes."""
    rss: int = psutil.Process().memory_info().rss
    return rss

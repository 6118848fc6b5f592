"""How a request draws its tokens, and the numbers that it draws them with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.bundles.contract import MAX_TOP_K, POLICY_INPUTS, numbers_per_draw
from medusa_runtime.bundles.tree import Tree
from medusa_runtime.errors import RequestError

_PART = 16  # tokens whose numbers are made together
_PARTS_KEPT = 8  # behind the newest
_LEAST_NUMBER = 1e-30  # a weight of 1 divided by it is a number in fp32 still


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw tokens from what the base model gives.

    Its distribution is divided by the temperature and cut off by top-k, top-p and min-p, in this order.
    An object never changes, so that requests and threads may share it.

    Attributes:
        temperature: Up to 1000; 0 is greedy decoding, whatever else is said.
        top_k: Keep so many of the best tokens, 256 at most; 0 keeps all.
        top_p: Keep the best tokens that together have this probability; 1 keeps all.
        min_p: Keep tokens that have at least this part of the best one's probability; 0 keeps all.
        seed: The same seed gives the same tokens; None takes another one each time.
        acceptance: ``exact``: tokens are distributed as if the base model decoded alone, whatever the tree.
            ``typical``: drafts are accepted wherever they are likely enough [2.3.1], which takes fewer steps and
            changes the distribution.
        typical_epsilon: ε, above 0: a drafted token x is accepted if p(x) > min(ε, alpha exp(-H(p))).
        typical_alpha: alpha; the square root of ε if None.

    Raises:
        RequestError: A value makes no sense.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    acceptance: Literal["exact", "typical"] = "exact"
    typical_epsilon: float = 0.09
    typical_alpha: float | None = None

    def __post_init__(self) -> None:
        heat = number_of(self.temperature)  # beyond these bounds fp32 knows it as 0, or tokens as equally likely
        self._check("temperature", heat == 0 or 1e-30 <= heat <= 1e3, "0, or a number from 1e-30 to 1000")
        self._check("top_k", 0 <= _integer(self.top_k) <= MAX_TOP_K, f"an integer from 0, which is off, to {MAX_TOP_K}")
        self._check("top_p", 0 < number_of(self.top_p) <= 1, "a number above 0, up to 1")
        self._check("min_p", 0 <= number_of(self.min_p) <= 1, "a number from 0 to 1")
        self._check("seed", self.seed is None or _integer(self.seed) >= 0, "an integer, 0 or above, or None")
        self._check("typical_epsilon", 0 < number_of(self.typical_epsilon) <= 1, "a number above 0, up to 1")
        alpha = self.typical_alpha
        self._check(
            "typical_alpha", alpha is None or 1e-30 <= number_of(alpha) <= 1e30, "a number from 1e-30 to 1e30, or None"
        )
        if self.acceptance not in ("exact", "typical"):
            raise RequestError(f"acceptance is {self.acceptance!r}: expected 'exact' or 'typical'.")

    def _check(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise RequestError(f"{name} is {getattr(self, name)!r}: expected {expected}.")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def typical(self) -> bool:
        """Whether drafts are accepted that are merely likely."""
        return self.acceptance == "typical" and not self.greedy

    def row_inputs(self) -> dict[str, float]:
        """A row's values for the inputs of the graph, but for ``exponentials``."""
        alpha = math.sqrt(self.typical_epsilon) if self.typical_alpha is None else self.typical_alpha
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_epsilon": self.typical_epsilon if self.typical else 0.0,
            "typical_alpha": alpha,
        }


def _integer(value: object) -> float:
    """An integer; NaN, which no comparison holds for, if it is none."""
    return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else math.nan


def number_of(value: object) -> float:
    """A number; NaN, which no comparison holds for, if it is none."""
    try:
        return float(value if isinstance(value, float | np.floating) else _integer(value))
    except OverflowError:
        return math.inf


GREEDY = SamplingParams(temperature=0.0)


class Draws:
    """How one request draws: its parameters, and the numbers of each token that it will have.

    Args:
        params: The parameters; ``GREEDY`` for a request that wants log probabilities only.
        first: The place of its first token in the text: the length of its prompt.
        vocab_size: Of the model.
    """

    def __init__(self, params: SamplingParams, first: int, vocab_size: int) -> None:
        self.params = params
        self._first = first
        self._size = numbers_per_draw(vocab_size)
        self._entropy = np.random.SeedSequence(params.seed).entropy
        self._parts: dict[int, NDArray[np.float32]] = {}

    def numbers(self, place: int, count: int) -> NDArray[np.float32]:
        """The numbers [count, blocks + 256] of so many tokens from a place in the text on; those of the prompt get any.

        They are exponentially distributed. The same seed and the same place after the prompt give the same ones.
        """
        start = max(place - self._first, 0)
        first = start // _PART
        parts = [self._part(number) for number in range(first, (start + count - 1) // _PART + 1)]
        return np.concatenate(parts)[start - first * _PART :][:count]

    def _part(self, number: int) -> NDArray[np.float32]:
        if number not in self._parts:
            for old in [old for old in self._parts if old < number - _PARTS_KEPT]:
                del self._parts[old]
            rng = np.random.default_rng(np.random.SeedSequence(self._entropy, spawn_key=(number,)))
            drawn = rng.standard_exponential((_PART, self._size))
            self._parts[number] = np.maximum(drawn, _LEAST_NUMBER).astype(np.float32)
        return self._parts[number]


def draws_ahead(tree: Tree) -> int:
    """Tokens per row, W, whose numbers do for any step of a tree, and for the one after it before its end is known."""
    return max(tree.size, 2 * (tree.max_depth + 1))


class SamplingRows:
    """The graph's inputs for sampling, over the rows of a backend.

    Args:
        rows: How many.

    Attributes:
        inputs: [rows] for each input but ``exponentials``, by name.
    """

    def __init__(self, rows: int) -> None:
        self.inputs: dict[str, NDArray[Any]] = {spec.name: np.zeros(rows, spec.dtype) for spec in POLICY_INPUTS}
        self._draws: list[Draws | None] = [None] * rows
        for row in range(rows):
            self.assign(row, None)

    def assign(self, row: int, draws: Draws | None) -> None:
        """How a row draws from its next step on; None if it is greedy and nobody asks for log probabilities."""
        self._draws[row] = draws
        for name, value in (draws.params if draws is not None else GREEDY).row_inputs().items():
            self.inputs[name][row] = value

    def width(self, size: int, prefilling: Collection[int], rows: Sequence[int]) -> int:
        """For how many tokens a step of ``size`` needs numbers in each of its rows: none if none of them draws."""
        if all(self._draws[row] is None for row in rows):
            return 0
        return 1 if all(row in prefilling for row in rows) else size

    def write(
        self,
        exponentials: NDArray[np.float32],
        lengths: Sequence[int] | NDArray[np.int64],
        prompts: Mapping[int, Sequence[int]],
    ) -> None:
        """Writes the numbers of a step.

        Args:
            exponentials: [rows, W, blocks + 256]; those of the token at place q are written to q mod W.
            lengths: Committed entries per row.
            prompts: Chunks of prompt by row.
        """
        width = exponentials.shape[1]
        for row, draws in enumerate(self._draws):
            if draws is None or draws.params.greedy:
                exponentials[row] = 1  # any number that can be divided by
            elif width:
                place = int(lengths[row]) + (len(prompts[row]) if row in prompts else 1)
                exponentials[row, (place + np.arange(width)) % width] = draws.numbers(place, width)

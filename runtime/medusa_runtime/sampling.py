"""Sampling parameters of requests, and the random numbers that they draw tokens with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.contract import (
    MAX_TOP_K,
    PENALTY_INPUTS,
    POLICY_INPUTS,
    RANKED_PLACES,
    fixed_shape,
    numbers_per_draw,
)
from medusa_runtime.bundles.tree import Tree
from medusa_runtime.common.numbers import integer_of, number_of
from medusa_runtime.constraints.row import NO_PENALTIES, RowConstraints
from medusa_runtime.constraints.rows import ConstraintRows
from medusa_runtime.errors import BackendError, RequestError

_PART = 16  # tokens per part: their numbers are made together
_PARTS_KEPT = 8  # parts before the newest one that are kept
_LEAST_NUMBER = 1e-30  # 1 divided by it is still finite in fp32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters for drawing tokens from the base model's distribution.

    The logits are divided by the temperature. Then top-k, top-p and min-p remove tokens, in this order. Objects are
    immutable, so requests and threads may share them.

    Attributes:
        temperature: 0, or up to 1000. At 0 decoding is greedy, and all other parameters have no effect.
        top_k: Keep this number of the most likely tokens, at most 256; 0 keeps all.
        top_p: Keep the most likely tokens that together have this probability; 1 keeps all.
        min_p: Keep tokens with at least this share of the most likely token's probability; 0 keeps all.
        seed: Seed of the random numbers. The same seed gives the same tokens. None takes a new seed for each request.
        acceptance: The acceptance rule. ``exact``: tokens are distributed as in plain decoding, with any tree.
            ``typical``: a drafted token is accepted if it is likely enough [2.3.1]. This takes fewer steps and changes
            the distribution.
        typical_epsilon: ε, above 0: a drafted token x is accepted if p(x) > min(ε, alpha exp(-H(p))).
        typical_alpha: alpha; the square root of ε if None.

    Raises:
        RequestError: A value is out of range or of the wrong type.
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
        heat = number_of(self.temperature)  # beyond these bounds fp32 rounds it to 0, or all tokens are equally likely
        self._check("temperature", heat == 0 or 1e-30 <= heat <= 1e3, "0, or a number from 1e-30 to 1000")
        self._check("top_k", 0 <= integer_of(self.top_k) <= MAX_TOP_K, f"an integer from 0 (off) to {MAX_TOP_K}")
        self._check("top_p", 0 < number_of(self.top_p) <= 1, "a number above 0, up to 1")
        self._check("min_p", 0 <= number_of(self.min_p) <= 1, "a number from 0 to 1")
        self._check("seed", self.seed is None or integer_of(self.seed) >= 0, "an integer, 0 or above, or None")
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
        """True if tokens are chosen without random numbers."""
        return self.temperature == 0

    @property
    def typical(self) -> bool:
        """True if the acceptance rule is ``typical``, and decoding is not greedy."""
        return self.acceptance == "typical" and not self.greedy

    def row_inputs(self) -> dict[str, float]:
        """A row's values of the graph's sampling inputs, without ``exponentials``."""
        alpha = math.sqrt(self.typical_epsilon) if self.typical_alpha is None else self.typical_alpha
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_epsilon": self.typical_epsilon if self.typical else 0.0,
            "typical_alpha": alpha,
        }


GREEDY = SamplingParams(temperature=0.0)


class Draws:
    """The sampling parameters of one request, the random numbers of each of its tokens, and its constraints.

    Args:
        params: The parameters; ``GREEDY`` for a greedy request with constraints, or that asks for log probabilities.
        first: Position of the request's first drawn token: the length of its prompt.
        vocab_size: Size of the model's vocabulary.
        constraints: What the request demands of its tokens; None if nothing.
        ranks: True if the request needs the most likely tokens of each place.

    Attributes:
        params: The parameters.
        constraints: What the request demands of its tokens; None if nothing.
        ranks: True if the request needs the most likely tokens of each place.
    """

    def __init__(
        self,
        params: SamplingParams,
        first: int,
        vocab_size: int,
        constraints: RowConstraints | None = None,
        *,
        ranks: bool = False,
    ) -> None:
        self.params = params
        self.constraints = constraints
        self.ranks = ranks
        self._first = first
        self._size = numbers_per_draw(vocab_size)
        self._entropy = np.random.SeedSequence(params.seed).entropy
        self._parts: dict[int, NDArray[np.float32]] = {}

    def numbers(self, place: int, count: int) -> NDArray[np.float32]:
        """Random numbers for consecutive tokens, [count, blocks + 256], exponentially distributed.

        The same seed and the same position after the prompt give the same numbers. Positions inside the prompt are not
        drawn: they get those of the first drawn token.

        Args:
            place: Position of the first token in the text.
            count: Number of tokens.
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
    """Number of tokens per row that have random numbers in a step, W.

    They suffice for any step of the tree, and for the next step while the number of accepted tokens is still unknown.
    """
    return max(tree.size, 2 * (tree.max_depth + 1))


class SamplingRows:
    """The graph's inputs for sampling and constraints, for all rows of a backend.

    Args:
        rows: Number of rows.
        constraints: The constraints of all rows; None if the graph knows none.
        most_ranked: The most places that a step gives the most likely tokens for: M + 1, or 0 if the graph gives none.

    Attributes:
        inputs: The values of inputs with one number per row, by name.
        constraints: The constraints of all rows; None if the graph knows none.
    """

    def __init__(self, rows: int, constraints: ConstraintRows | None = None, *, most_ranked: int = 0) -> None:
        self.inputs: dict[str, NDArray[Any]] = {spec.name: np.zeros(rows, spec.dtype) for spec in POLICY_INPUTS}
        self.constraints = constraints
        if constraints is not None:
            shapes = {spec.name: fixed_shape(spec, {"batch": rows}) for spec in PENALTY_INPUTS}
            self.inputs |= {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self._most_ranked = most_ranked
        self._places = [np.tile(np.arange(count), (rows, 1)) for count in range(most_ranked + 1)]
        self._draws: list[Draws | None] = [None] * rows
        for row in range(rows):
            self.assign(row, None)

    @classmethod
    def of(cls, bundle: Bundle, rows: int, *, rounds_up: bool = False) -> Self:
        """The inputs of a bundle's graph, which can sample.

        Args:
            bundle: The bundle.
            rows: Number of rows.
            rounds_up: As for ``ConstraintRows``.
        """
        vocab_size, tree_size = bundle.model.vocab_size, bundle.tree.size
        constraints = ConstraintRows(rows, vocab_size, tree_size, rounds_up=rounds_up) if bundle.constraints else None
        most_ranked = bundle.slots.most_committed if bundle.top_logprobs else 0
        return cls(rows, constraints, most_ranked=most_ranked)

    def assign(self, row: int, draws: Draws | None) -> None:
        """Sets how a row draws from its next step on.

        Args:
            row: The row.
            draws: The row's parameters and numbers; None for a greedy row without constraints and log probabilities.

        Raises:
            BackendError: The row has constraints or needs the most likely tokens, and the graph knows none.
        """
        constraints = None if draws is None else draws.constraints
        if self.constraints is not None:
            self.constraints.assign(row, constraints)
            for name, value in (NO_PENALTIES if constraints is None else constraints.penalties).items():
                self.inputs[name][row] = value
        elif constraints is not None:
            raise BackendError("The graph of this bundle has no inputs for constraints: export the bundle again.")
        if draws is not None and draws.ranks and not self._most_ranked:
            raise BackendError("The graph of this bundle gives no most likely tokens: export the bundle again.")
        self._draws[row] = draws
        for name, value in (draws.params if draws is not None else GREEDY).row_inputs().items():
            self.inputs[name][row] = value

    def width(self, size: int, prefilling: Collection[int], rows: Sequence[int]) -> int:
        """Number of tokens per row that need random numbers in a step; 0 if none of its rows draws.

        Args:
            size: Number of nodes that the step verifies.
            prefilling: Rows that take in a chunk of their prompt.
            rows: All rows of the step.
        """
        if all(self._draws[row] is None for row in rows):
            return 0
        return 1 if all(row in prefilling for row in rows) else size

    def ranked_places(
        self, size: int, prefilling: Collection[int], rows: Sequence[int]
    ) -> dict[str, NDArray[np.int64]]:
        """The input with the places of a step that need the most likely tokens, [all rows, Q], by its name.

        Q is 0 if none of the rows asks for them. There is no such input if the graph does not give them.

        Args:
            size: Number of nodes that the step verifies.
            prefilling: Rows that take in a chunk of their prompt.
            rows: All rows of the step.
        """
        if not self._most_ranked:
            return {}
        count = 0
        if any((draws := self._draws[row]) is not None and draws.ranks for row in rows):
            count = 1 if all(row in prefilling for row in rows) else min(size, self._most_ranked)
        return {RANKED_PLACES.name: self._places[count]}

    def write(
        self,
        exponentials: NDArray[np.float32],
        lengths: Sequence[int] | NDArray[np.int64],
        prompts: Mapping[int, Sequence[int]],
    ) -> None:
        """Writes the random numbers of a step.

        Args:
            exponentials: Array to write to, [rows, W, blocks + 256]. The numbers of the token at position q are written
                to index q mod W.
            lengths: Committed entries per row.
            prompts: Chunks of prompts, by row.
        """
        width = exponentials.shape[1]
        for row, draws in enumerate(self._draws):
            if draws is None or draws.params.greedy:
                exponentials[row] = 1  # not used, but the graph divides by it
            elif width:
                place = int(lengths[row]) + (len(prompts[row]) if row in prompts else 1)
                exponentials[row, (place + np.arange(width)) % width] = draws.numbers(place, width)

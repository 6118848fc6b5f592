"""Which tree fits the load: by how long steps take on this machine, and by how many guesses turn out right.

The bundle says what to expect of each node, as calibrated: in steps that have a guess from the text, and in those that
have the heads' candidates alone. But some requests are harder to guess than others. So what is accepted is counted, of
all requests and of each by itself, for both kinds of steps apart, and guesses are taken to be right less often, or
more, by the same factor in all depths: a node of depth d counts by that factor to the power of d. Requests that are
hard to guess take longest and are left among themselves in the end, which is why each has a count of its own.

Steps of one token guess nothing: while they are chosen what was counted fades, so that trees are tried again later.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from medusa_runtime.bundle import Acceptance, Bundle
from medusa_runtime.latency import LatencyTable
from medusa_runtime.tree import Tree

# Nodes per step: a number of them, or what a `TreeChoice` chooses.
TreeSize = int | Literal["auto"]
# A tree has to promise so much more speed than plain decoding: tables are measured, and no better than this.
MARGIN = 0.03


@dataclass
class Guesses:
    """How many guesses were right, and how many the bundle led to expect.

    Attributes:
        prior: What is known beforehand counts as much as this many right guesses.
        fading: What was counted is worth so much after one more step.
    """

    prior: float
    fading: float
    accepted: float = 0.0
    expected: float = 0.0

    def observe(self, accepted: float, expected: float) -> None:
        """Counts a step of a request."""
        self.accepted = self.fading * self.accepted + accepted
        self.expected = self.fading * self.expected + expected

    def accuracy(self, beforehand: float = 1.0) -> float:
        """Right guesses per expected one, where ``beforehand`` is what to think without having counted any."""
        return (self.accepted + self.prior * beforehand) / (self.expected + self.prior)


class TreeChoice:
    """Chooses tree sizes.

    Args:
        acceptance: What to expect of the nodes of a tree.
        tree: The tree.
        tables: Latencies by the number of rows in a step, ascending.
    """

    def __init__(self, acceptance: Acceptance, tree: Tree, tables: Mapping[int, LatencyTable]) -> None:
        self._acceptance = acceptance
        self._depths = tree.depths
        self._reached: dict[tuple[int, bool], list[float]] = {}
        self._tables = dict(tables)
        # Half after about 1,400 steps of a request.
        self._all = {guessed: Guesses(prior=30, fading=0.9995) for guessed in (False, True)}
        self._rows: dict[tuple[int, bool], Guesses] = {}
        self._grown: set[tuple[int, bool]] = set()  # rows, and whether one has a guess, where trees are in use

    @classmethod
    def fixed(cls, bundle: Bundle, size: int) -> Self:
        """One that has no choice, for steps of one row."""
        return cls(bundle.acceptance, bundle.tree, {1: LatencyTable({size: 1.0})})

    @property
    def largest(self) -> int:
        """The largest tree that may be chosen, in nodes."""
        return max((size for table in self._tables.values() for size in table.seconds), default=1)

    @property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """What is best at present for rows that are like all others, by their number: with a guess in none, in all."""
        without, with_guess = ((kind, self.accuracy(guessed=kind)) for kind in (False, True))
        return {n: (self._best(n, [without] * n)[0], self._best(n, [with_guess] * n)[0]) for n in self._tables}

    def accuracy(self, *, guessed: bool) -> float:
        """How many tokens are right, against what the bundle expects, in steps of one kind."""
        return self._all[guessed].accuracy()

    def accuracy_of(self, row: int, *, guessed: bool) -> float:
        """The same for the request in a row, which is like all others until it shows otherwise."""
        found, beforehand = self._rows.get((row, guessed)), self.accuracy(guessed=guessed)
        return found.accuracy(beforehand) if found is not None else beforehand

    def begin(self, row: int) -> None:
        """Another request begins in a row."""
        for guessed in (False, True):
            self._rows.pop((row, guessed), None)

    def size(self, rows: Sequence[int], guessed: Collection[int] = ()) -> int:
        """Nodes per row in a step of these rows; more of them than were measured have one each.

        Args:
            rows: The rows.
            guessed: Those that have a guess from the text.
        """
        measured = next((count for count in self._tables if count >= len(rows)), None)
        if measured is None:
            return 1
        kinds = [row in guessed for row in rows]
        best, gain = self._best(
            measured, [(kind, self.accuracy_of(row, guessed=kind)) for row, kind in zip(rows, kinds, strict=True)]
        )
        place = (measured, any(kinds))
        if best == 1:
            self._grown.discard(place)
        elif gain > 1 + MARGIN:
            self._grown.add(place)
        return best if place in self._grown else 1

    def _best(self, measured: int, rows: Sequence[tuple[bool, float]]) -> tuple[int, float]:
        """The size with the best expected speed, and that speed against plain decoding's.

        Args:
            measured: The table to go by.
            rows: For each row whether it has a guess, and its accuracy.
        """
        seconds = self._tables[measured].seconds
        rates = {
            size: sum(self.expected_tokens(size, accuracy, guessed=guessed) for guessed, accuracy in rows) / taken
            for size, taken in seconds.items()
        }
        best = max(rates, key=lambda size: (rates[size], -size))
        return best, rates[best] / rates[1] if 1 in rates else math.inf

    def observe(self, size: int, emitted: Mapping[int, int], guessed: Collection[int] = ()) -> None:
        """Counts a step: what each row emitted, by row. A token is counted if those above it were right.

        Args:
            size: Nodes per row.
            emitted: Tokens by row.
            guessed: Rows that had a guess from the text.
        """
        for row, count in emitted.items():
            kind = row in guessed
            reached = self._chances(size, guessed=kind)
            conditional = [chance / above for chance, above in zip(reached, [1.0, *reached], strict=False)]
            counts = (count - 1, sum(conditional[:count]))
            self._all[kind].observe(*counts)
            self._rows.setdefault((row, kind), Guesses(prior=10, fading=0.99)).observe(*counts)

    def expected_tokens(self, size: int, accuracy: float, *, guessed: bool = False) -> float:
        """Expected tokens per step of a request."""
        chances = enumerate(self._chances(size, guessed=guessed), 1)
        return 1 + sum(min(1.0, accuracy**depth * chance) for depth, chance in chances)

    def _chances(self, size: int, *, guessed: bool) -> list[float]:
        """The chance that a tree of ``size`` nodes is right to each depth from 1 on, as calibrated."""
        if (size, guessed) not in self._reached:
            values = self._acceptance.values(guessed=guessed)[:size]
            sums = np.bincount(self._depths[:size], weights=values)[1:].tolist()
            self._reached[size, guessed] = [chance for chance in sums if chance > 0]
        return self._reached[size, guessed]

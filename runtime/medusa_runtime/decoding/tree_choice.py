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
from numpy.typing import NDArray

from medusa_runtime.bundles.bundle import Acceptance, Bundle
from medusa_runtime.bundles.tree import Tree
from medusa_runtime.decoding.latency import LatencyTable

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
        at_depth = tree.depths[:, None] == np.arange(1, tree.max_depth + 1)
        # The chance that the first so many nodes are right to each depth from 1 on, as calibrated: [T, max_depth].
        self._chances = {
            guessed: np.cumsum(np.where(at_depth, np.array(acceptance.values(hit=guessed))[:, None], 0), 0)
            for guessed in (False, True)
        }
        self._tried = {guessed: _right_of_tried(chances) for guessed, chances in self._chances.items()}
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
        without, with_guess = (
            {n: self._best(n, [kind] * n, [self.accuracy(guessed=kind)] * n)[0] for n in self._tables}
            for kind in (False, True)
        )
        return {n: (without[n], with_guess[n]) for n in self._tables}

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
        """Nodes per row in the next step of these rows; more of them than were measured have one each.

        Args:
            rows: The rows.
            guessed: Those that have a guess from the text.
        """
        measured = self._measured(len(rows))
        if measured is None:
            return 1
        kinds = [row in guessed for row in rows]
        best, gain = self._best(measured, kinds, self._accuracies(rows, kinds))
        place = (measured, any(kinds))
        if best == 1:
            self._grown.discard(place)
        elif gain > 1 + MARGIN:
            self._grown.add(place)
        return best if place in self._grown else 1

    def outlook(self, rows: Sequence[int]) -> int:
        """About the most nodes per row that a step of these rows will have, whichever of them have a guess."""
        measured = self._measured(len(rows))
        if measured is None:
            return 1
        kinds = ([kind] * len(rows) for kind in (False, True))
        return max(self._best(measured, kind, self._accuracies(rows, kind))[0] for kind in kinds)

    def _measured(self, rows: int) -> int | None:
        """The table to go by for so many rows."""
        return next((count for count in self._tables if count >= rows), None)

    def _accuracies(self, rows: Sequence[int], kinds: Sequence[bool]) -> list[float]:
        return [self.accuracy_of(row, guessed=kind) for row, kind in zip(rows, kinds, strict=True)]

    def _best(self, measured: int, kinds: Sequence[bool], accuracies: Sequence[float]) -> tuple[int, float]:
        """The size with the best expected speed, and that speed against plain decoding's.

        Args:
            measured: The table to go by.
            kinds: For each row whether it has a guess.
            accuracies: Of each row's guesses.
        """
        seconds = self._tables[measured].seconds
        sizes = list(seconds)
        tokens = np.zeros(len(sizes))
        for kind in {*kinds}:
            of_kind = [accuracy for accuracy, its in zip(accuracies, kinds, strict=True) if its == kind]
            tokens += self._expected(sizes, of_kind, guessed=kind).sum(0)
        rates = tokens / list(seconds.values())
        best = int(rates.argmax())  # the first of several: sizes ascend
        return sizes[best], float(rates[best] / rates[sizes.index(1)]) if 1 in seconds else math.inf

    def observe(self, size: int, emitted: Mapping[int, int], guessed: Collection[int] = ()) -> None:
        """Counts a step: what each row emitted, by row. A token is counted if those above it were right.

        Args:
            size: Nodes per row.
            emitted: Tokens by row.
            guessed: Rows that had a guess from the text.
        """
        for row, count in emitted.items():
            kind = row in guessed
            expected = self._tried[kind][size - 1]
            counts = (count - 1, float(expected[min(count, len(expected) - 1)]))
            self._all[kind].observe(*counts)
            self._rows.setdefault((row, kind), Guesses(prior=10, fading=0.99)).observe(*counts)

    def expected_tokens(self, size: int, accuracy: float, *, guessed: bool = False) -> float:
        """Expected tokens per step of a request."""
        return float(self._expected([size], [accuracy], guessed=guessed)[0, 0])

    def _expected(self, sizes: Sequence[int], accuracies: Sequence[float], *, guessed: bool) -> NDArray[np.float64]:
        """Expected tokens per step, [accuracies, sizes]."""
        chances = self._chances[guessed][np.array(sizes) - 1]
        depths = np.arange(1, chances.shape[1] + 1)
        by_depth = np.array(accuracies)[:, None, None] ** depths * chances
        return 1.0 + np.asarray(np.minimum(by_depth, 1.0).sum(-1))


def _right_of_tried(chances: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many of the first n guesses are right where those before each were, [T, max_depth + 1]."""
    above = np.hstack([np.ones_like(chances[:, :1]), chances[:, :-1]])
    conditional = np.divide(chances, above, out=np.zeros_like(chances), where=above > 0)
    return np.pad(np.cumsum(conditional, 1), ((0, 0), (1, 0)))

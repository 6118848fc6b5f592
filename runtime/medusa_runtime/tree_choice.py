"""Which tree fits the load: by how long steps take on this machine, and by how many guesses turn out right.

The bundle says what to expect of each node, as calibrated; but some requests are harder to guess than others. So what
is accepted is counted, of all requests and of each by itself, and guesses are taken to be right less often, or more, by
the same factor in all depths: a node of depth d counts by that factor to the power of d. Requests that are hard to
guess take longest and are left among themselves in the end, which is why each has a count of its own.

Steps of one token guess nothing: while they are chosen what was counted fades, so that trees are tried again later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.bundle import Acceptance
from medusa_runtime.latency import LatencyTable

# A larger tree has to promise so much more speed: tables are measured, and no better than this.
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
        acceptance: What the bundle expects.
        depths: Of the tree's nodes, [T].
        tables: Latencies by the number of rows in a step, ascending.
    """

    def __init__(self, acceptance: Acceptance, depths: NDArray[np.int64], tables: Mapping[int, LatencyTable]) -> None:
        self._acceptance = acceptance
        self._depths = depths
        self._reached: dict[int, list[float]] = {}
        self._tables = dict(tables)
        self._current = dict.fromkeys(self._tables, 1)
        self._all = Guesses(prior=30, fading=0.9995)  # half after about 1,400 steps of a request
        self._rows: dict[int, Guesses] = {}

    @property
    def current(self) -> Mapping[int, int]:
        """The sizes last chosen, by the number of rows in a step."""
        return self._current

    @property
    def accuracy(self) -> float:
        """How many guesses are right, against what the bundle expects."""
        return self._all.accuracy()

    def accuracy_of(self, row: int) -> float:
        """The same for the request in a row, which is like all others until it shows otherwise."""
        return self._rows[row].accuracy(self.accuracy) if row in self._rows else self.accuracy

    def begin(self, row: int) -> None:
        """Another request begins in a row."""
        self._rows.pop(row, None)

    def size(self, accuracies: Sequence[float]) -> int:
        """Nodes per row in a step of requests with these accuracies; more of them than were measured have one each."""
        measured = next((count for count in self._tables if count >= len(accuracies)), None)
        if measured is None:
            return 1
        seconds, current = self._tables[measured].seconds, self._current[measured]
        rates = {
            size: sum(self.expected_tokens(size, accuracy) for accuracy in accuracies) / taken
            for size, taken in seconds.items()
        }
        best = max(rates, key=lambda size: (rates[size], -size))
        if best < current or rates[best] > (1 + MARGIN) * rates[current]:
            self._current[measured] = best
        return self._current[measured]

    def observe(self, size: int, emitted: Mapping[int, int]) -> None:
        """Counts a step: what each row emitted, by row. A guess is counted if those above it were right."""
        reached = self._chances(size)
        conditional = [chance / above for chance, above in zip(reached, [1.0, *reached], strict=False)]
        for row, count in emitted.items():
            counts = (count - 1, sum(conditional[:count]))
            self._all.observe(*counts)
            self._rows.setdefault(row, Guesses(prior=10, fading=0.99)).observe(*counts)

    def expected_tokens(self, size: int, accuracy: float) -> float:
        """Expected tokens per step of a request."""
        chances = enumerate(self._chances(size), 1)
        return 1 + sum(min(1.0, accuracy**depth * chance) for depth, chance in chances)

    def _chances(self, size: int) -> list[float]:
        """The chance that a tree of ``size`` nodes is right to each depth from 1 on, as calibrated."""
        if size not in self._reached:
            values = self._acceptance.node_values[:size]
            sums = np.bincount(self._depths[:size], weights=values)[1:].tolist()
            self._reached[size] = [chance for chance in sums if chance > 0]
        return self._reached[size]

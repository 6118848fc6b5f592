"""Tree choice: the number of nodes that the next step verifies, from measured step times and counted acceptance.

The bundle has an acceptance estimate for each node: one for steps with a lookup hit, one for steps without. But texts
differ. So accepted tokens are counted, for both kinds of steps, over all requests and for each request. The counts give
one factor, called accuracy here: accepted tokens per expected one. The estimate of a node at depth d is multiplied by
the factor to the power of d. It begins below 1, because the tree was chosen by the same estimates, which makes them too
high. Requests that are hard to draft for take longest and run alone in the end. That is why each request has counts of
its own.

Plain steps draft nothing. While they are chosen the counts fade, so that trees are tried again later.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import add, truediv

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.bundles.facts import Acceptance
from medusa_runtime.bundles.tree import Tree
from medusa_runtime.decoding.latency import LatencyTable
from medusa_runtime.request import TreeSize
from medusa_runtime.tuning import FIRST_ACCURACY, LEAST_GAIN

# Accuracies are multiples of one by this number. A choice takes larger ones than 2 for 2.
_LEVELS = 200
_MOST_LEVELS = 2 * _LEVELS


@dataclass
class AcceptanceCount:
    """Accepted tokens, and the number that the bundle's estimates led to expect.

    Attributes:
        prior: Weight of the accuracy that is assumed beforehand, in accepted tokens.
        fading: Factor by which a step reduces earlier counts.
        accepted: Accepted tokens.
        expected: Expected tokens.
    """

    prior: float
    fading: float
    accepted: float = 0.0
    expected: float = 0.0

    def observe(self, accepted: float, expected: float) -> None:
        """Counts one step of one request."""
        self.accepted = self.fading * self.accepted + accepted
        self.expected = self.fading * self.expected + expected

    def accuracy(self, beforehand: float = FIRST_ACCURACY) -> float:
        """Accepted tokens per expected one, rounded; ``beforehand`` is the value without any count."""
        return round((self.accepted + self.prior * beforehand) / (self.expected + self.prior) * _LEVELS) / _LEVELS


class _Candidates:
    """The tree sizes of a table of step times, compared with each other in each step.

    Args:
        table: The table.
        chances: [T, max_depth] by lookup hit: the chance that the first n nodes are right to each depth, n - 1 first.
    """

    def __init__(self, table: LatencyTable, chances: Mapping[bool, NDArray[np.float64]]) -> None:
        self.sizes = list(table.seconds)
        self._seconds = list(table.seconds.values())
        # By lookup hit and by accuracy in levels: [sizes] each. Right after a step, when little of numpy is in the
        # processor's cache, computing these took 0.1 ms.
        levels = np.arange(_MOST_LEVELS + 1) / _LEVELS
        self._expected = {
            hit: _expected_tokens(of_hit[np.array(self.sizes) - 1], levels[:, None, None]).tolist()
            for hit, of_hit in chances.items()
        }

    def best(self, kinds: Sequence[bool], accuracies: Sequence[float]) -> tuple[int, float]:
        """The size with the best expected speed, and that speed relative to plain decoding.

        Args:
            kinds: True per row that has a lookup hit.
            accuracies: The accuracy of each row.
        """
        tokens = [0.0] * len(self.sizes)
        for kind, accuracy in zip(kinds, accuracies, strict=True):
            level = min(round(accuracy * _LEVELS), _MOST_LEVELS)
            tokens = list(map(add, tokens, self._expected[kind][level]))
        rates = list(map(truediv, tokens, self._seconds))
        best = max(range(len(rates)), key=rates.__getitem__)  # the smallest of equally good ones: sizes ascend
        return self.sizes[best], rates[best] / rates[self.sizes.index(1)] if 1 in self.sizes else math.inf


def _expected_tokens(chances: NDArray[np.float64], accuracy: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected tokens per step, [...], by the chances to each depth, [..., max_depth], and accuracies, [..., 1]."""
    depths = np.arange(1, chances.shape[-1] + 1)
    return 1.0 + np.asarray(np.minimum(accuracy**depths * chances, 1.0).sum(-1))


class TreeChoice:
    """Chooses tree sizes.

    Args:
        acceptance: The bundle's acceptance estimates.
        tree: The bundle's tree.
        tables: Measured step times by the number of rows in a step, ascending. Without any, all steps are plain.
    """

    def __init__(self, acceptance: Acceptance, tree: Tree, tables: Mapping[int, LatencyTable]) -> None:
        at_depth = tree.depths[:, None] == np.arange(1, tree.max_depth + 1)
        # The chance that the first n nodes are right to each depth, by the bundle: [T, max_depth], n - 1 first.
        self._chances = {
            hit: np.cumsum(np.where(at_depth, np.array(acceptance.values(hit=hit))[:, None], 0), 0)
            for hit in (False, True)
        }
        self._tried = {hit: _expected_by_tried(chances) for hit, chances in self._chances.items()}
        self._candidates = {rows: _Candidates(table, self._chances) for rows, table in tables.items()}
        # A count is worth half after about 1,400 steps.
        self._all = {hit: AcceptanceCount(prior=30, fading=0.9995) for hit in (False, True)}
        self._rows: dict[tuple[int, bool], AcceptanceCount] = {}
        self._grown: set[tuple[int, bool]] = set()  # where trees are in use: rows of the table, any lookup hit

    @property
    def largest(self) -> int:
        """The largest tree that may be chosen, in nodes."""
        return max((size for found in self._candidates.values() for size in found.sizes), default=1)

    @property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """Best tree size by number of rows, as (without, with) a lookup hit, for requests of average accuracy."""
        without, with_hit = (
            {n: found.best([hit] * n, [self.accuracy(hit=hit)] * n)[0] for n, found in self._candidates.items()}
            for hit in (False, True)
        )
        return {n: (without[n], with_hit[n]) for n in self._candidates}

    def accuracy(self, *, hit: bool) -> float:
        """Accepted tokens per expected one over all requests, in steps with or without a lookup hit."""
        return self._all[hit].accuracy()

    def accuracy_of(self, row: int, *, hit: bool) -> float:
        """The same for the request in a row. It begins with the value of all requests."""
        found, beforehand = self._rows.get((row, hit)), self.accuracy(hit=hit)
        return found.accuracy(beforehand) if found is not None else beforehand

    def begin(self, row: int) -> None:
        """Forgets the counts of a row, for a new request."""
        for hit in (False, True):
            self._rows.pop((row, hit), None)

    def size(self, rows: Sequence[int], hits: Collection[int] = ()) -> int:
        """Nodes per row in the next step of these rows. If no table has that many rows, it is 1.

        Args:
            rows: The rows.
            hits: Rows that have a lookup hit.
        """
        measured = self._measured(len(rows))
        if measured is None:
            return 1
        kinds = [row in hits for row in rows]
        best, gain = self._candidates[measured].best(kinds, self._accuracies(rows, kinds))
        place = (measured, any(kinds))
        if best == 1:
            self._grown.discard(place)
        elif gain > 1 + LEAST_GAIN:
            self._grown.add(place)
        return best if place in self._grown else 1

    def outlook(self, rows: Sequence[int]) -> int:
        """About the most nodes per row in the next step of these rows, with any lookup hits."""
        measured = self._measured(len(rows))
        if measured is None:
            return 1
        kinds = ([hit] * len(rows) for hit in (False, True))
        found = self._candidates[measured]
        return max(found.best(kind, self._accuracies(rows, kind))[0] for kind in kinds)

    def _measured(self, rows: int) -> int | None:
        """The number of rows of the table to use for steps of ``rows`` rows; None if there is no table for them."""
        return next((count for count in self._candidates if count >= rows), None)

    def _accuracies(self, rows: Sequence[int], kinds: Sequence[bool]) -> list[float]:
        return [self.accuracy_of(row, hit=kind) for row, kind in zip(rows, kinds, strict=True)]

    def observe(self, size: int, emitted: Mapping[int, int], hits: Collection[int] = ()) -> None:
        """Counts a step. A node counts as tried if the nodes above it were accepted.

        Args:
            size: Nodes per row.
            emitted: Number of emitted tokens by row.
            hits: Rows that had a lookup hit.
        """
        for row, count in emitted.items():
            kind = row in hits
            expected = self._tried[kind][size - 1]
            counts = (count - 1, float(expected[min(count, len(expected) - 1)]))
            self._all[kind].observe(*counts)
            self._rows.setdefault((row, kind), AcceptanceCount(prior=10, fading=0.99)).observe(*counts)

    def expected_tokens(self, size: int, accuracy: float, *, hit: bool = False) -> float:
        """Expected tokens per step of a request with this accuracy."""
        return float(_expected_tokens(self._chances[hit][size - 1], accuracy))


def _expected_by_tried(chances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected number of accepted nodes, by nodes in the tree and by depths that were tried: [T, max_depth + 1]."""
    above = np.hstack([np.ones_like(chances[:, :1]), chances[:, :-1]])
    conditional = np.divide(chances, above, out=np.zeros_like(chances), where=above > 0)
    return np.pad(np.cumsum(conditional, 1), ((0, 0), (1, 0)))


class TreeSizes:
    """The tree size of each step: a fixed number of nodes, or the tree choice's.

    Args:
        tree_size: A number of nodes, or ``auto``.
        choice: Chooses where ``tree_size`` is ``auto``.

    Attributes:
        tree_size: A number of nodes, or ``auto``. It may be set between steps.
        choice: Chooses where ``tree_size`` is ``auto``. It counts steps only while it chooses.
    """

    def __init__(self, tree_size: TreeSize, choice: TreeChoice) -> None:
        self.tree_size = tree_size
        self.choice = choice

    @property
    def largest(self) -> int:
        """The most nodes that a step may have."""
        return self.most(self.tree_size)

    def most(self, tree_size: TreeSize) -> int:
        """The most nodes that a step may have with this tree size."""
        return self.choice.largest if tree_size == "auto" else tree_size

    def of(self, rows: Sequence[int], hits: Collection[int] = ()) -> int:
        """Nodes per row in the next step of these rows; ``hits`` are those with a lookup hit."""
        return self.choice.size(rows, hits) if self.tree_size == "auto" else self.tree_size

    def outlook(self, rows: Sequence[int]) -> int:
        """About the most nodes per row in the next step of these rows, before lookup."""
        return self.choice.outlook(rows) if self.tree_size == "auto" else self.tree_size

    def observe(self, size: int, emitted: Mapping[int, int], hits: Collection[int] = ()) -> None:
        """Counts a step, as ``TreeChoice.observe``."""
        if self.tree_size == "auto":
            self.choice.observe(size, emitted, hits)

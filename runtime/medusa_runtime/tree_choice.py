"""Which tree fits the load: by how long steps take on this machine, and by how many guesses turn out right.

The bundle says what to expect of each node, as calibrated; but some requests are harder to guess than others. So what
is accepted is counted, and the bundle's figures are taken to be wrong by the same factor for all nodes. Steps of one
token guess nothing: while they are chosen what was counted fades, so that trees are tried again later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medusa_runtime.bundle import Acceptance
from medusa_runtime.latency import LatencyTable

# A larger tree has to promise so much more speed: tables are measured, and no better than this.
MARGIN = 0.03
# The bundle's word counts as much as this many accepted guesses.
PRIOR = 30.0
# Of what was counted, this much is left after one more step of a row: half after about 1,400.
FADING = 0.9995


class TreeChoice:
    """Chooses tree sizes.

    Args:
        acceptance: What the bundle expects.
        tables: Latencies by the number of rows in a step, ascending.
    """

    def __init__(self, acceptance: Acceptance, tables: Mapping[int, LatencyTable]) -> None:
        self._acceptance = acceptance
        self._tables = dict(tables)
        self._current = dict.fromkeys(self._tables, 1)
        self._accepted = self._expected = 0.0

    @property
    def current(self) -> Mapping[int, int]:
        """The sizes last chosen, by the number of rows in a step."""
        return self._current

    @property
    def accuracy(self) -> float:
        """How many guesses are right, against what the bundle expects."""
        return (self._accepted + PRIOR) / (self._expected + PRIOR)

    def size(self, rows: int) -> int:
        """Nodes per row in a step of so many rows; a step of more rows than were measured has one."""
        measured = next((count for count in self._tables if count >= rows), None)
        if measured is None:
            return 1
        seconds, current = self._tables[measured].seconds, self._current[measured]
        rates = {size: self._expected_tokens(size) / taken for size, taken in seconds.items()}
        best = max(rates, key=lambda size: (rates[size], -size))
        if best < current or rates[best] > (1 + MARGIN) * rates[current]:
            self._current[measured] = best
        return self._current[measured]

    def observe(self, size: int, emitted: Sequence[int]) -> None:
        """Counts a step of some rows: what each of them emitted."""
        kept = FADING ** len(emitted)
        self._accepted = kept * self._accepted + sum(emitted) - len(emitted)
        self._expected = kept * self._expected + (self._acceptance.expected_tokens(size) - 1) * len(emitted)

    def _expected_tokens(self, size: int) -> float:
        return 1 + self.accuracy * (self._acceptance.expected_tokens(size) - 1)

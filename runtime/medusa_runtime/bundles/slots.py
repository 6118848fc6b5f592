"""Slots of K/V caches: where a row's entries are, and how much capacity a step takes.

A cache has a margin of M slots, M being the depth of the tree; entry i of a row is in slot M + i. A step of S tokens
over a row of L entries writes one block at slot L: the last M committed entries again, then S new ones. A graph that
keeps no pending entries writes the S new ones only, at slot M + L (docs/contract.md: Slots).
"""

from __future__ import annotations

from dataclasses import dataclass

from medusa_runtime.tuning import CAPACITY_STEP

# Slots that attention sums together in the graphs of bundles with weights in integers, in which each row must have the
# same bits whatever its neighbours. CAPACITY_STEP is a multiple of it.
PANEL = 64

# Tokens of a finished sequence that its last step doesn't find in the cache: the root of its tree, which that step
# writes, and the last token, which no step writes.
_NOT_CACHED = 2


@dataclass(frozen=True)
class SlotLayout:
    """The arithmetic of slots for one tree.

    Attributes:
        margin: Slots in front of entry 0 (M).
    """

    margin: int

    @property
    def most_committed(self) -> int:
        """The most entries that a step commits: those of a whole path, from the root to the deepest node."""
        return self.margin + 1

    def slot(self, entry: int) -> int:
        """The slot of an entry. The slot of entry ``length`` is the first one behind the committed entries."""
        return self.margin + entry

    def size_within_panel(self, length: int, size: int, panel: int) -> int:
        """The largest tree, up to ``size`` nodes, whose nodes behind the root are all in one panel of slots.

        Where sums of attention are by panel, a path of the tree then has its entries in the same panels as in plain
        decoding, in which they follow each other. Nodes are stored parents first, so any number of them is a tree.

        Args:
            length: Committed entries of the row.
            size: Nodes that are wanted.
            panel: Slots of a panel.
        """
        left = panel - self.slot(length) % panel
        return min(size, left if left > 1 else 1 + panel)  # the root alone may be in the panel before

    def committed(self, length: int) -> slice:
        """The slots of a row's committed entries."""
        return slice(self.margin, self.margin + length)

    def pending(self, length: int) -> slice:
        """The slots of the M newest entries of a row, which the next step writes again.

        For a row of fewer than M entries, the first of these slots are in the margin and hold no entry.
        """
        return slice(length, length + self.margin)

    def before_first(self, length: int) -> int:
        """Pending slots of a row that are in front of its entry 0: M - L, or 0."""
        return max(0, self.margin - length)

    def capacity(self, length: int, size: int = 0) -> int:
        """Slots that a row of ``length`` entries needs for a step of ``size`` tokens: M + L + S."""
        return self.margin + length + size

    def sequence_capacity(self, tokens: int, size: int) -> int:
        """Slots that a sequence of ``tokens``, prompt and answer, needs if its last step verifies ``size`` nodes."""
        return self.capacity(tokens - _NOT_CACHED, size)

    def longest_sequence(self, capacity: int, size: int) -> int:
        """The most tokens of prompt and answer in caches of ``capacity`` slots; inverse of ``sequence_capacity``."""
        return self.most_entries(capacity) - size + _NOT_CACHED

    def most_entries(self, capacity: int) -> int:
        """The most entries of a row in caches of ``capacity`` slots: C - M."""
        return capacity - self.margin


def rounded_capacity(capacity: int) -> int:
    """The next multiple of ``CAPACITY_STEP``: the slots to allocate for ``capacity`` slots."""
    return -(-capacity // CAPACITY_STEP) * CAPACITY_STEP

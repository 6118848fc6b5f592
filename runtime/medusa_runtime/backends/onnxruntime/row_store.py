"""The caches of many rows, in blocks.

A step reads the caches of its rows from one block. They are beside each other there and have the same capacity, and
attention reads all of it. But rows come and go, and one row may be ten times as long as another. So rows that step
together are brought together, in a block that fits the longest of them. A row that prefills steps alone: once it
outgrows the block of the others it gets a block of its own, and the others neither move nor read more for it.

A new block for long rows can be filled in parts, so that no step has to wait for all of it. Meanwhile a row stays where
it is and goes on. Entries that it appends after they would have been copied are copied in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.onnxruntime.cache_blocks import Block, CacheGroup, Growth, Window
from medusa_runtime.bundles.slots import rounded_capacity
from medusa_runtime.errors import BackendError
from medusa_runtime.tuning import LAST_MOVE, SPARE_SLOTS


class RowStore:
    """The caches of some rows.

    Args:
        lengths: Committed entries per row, [rows]; the owner of the array keeps it up to date.
        groups: The states by shape and type.
        margin: Slots in front of the first entry (M).

    Attributes:
        blocks: All blocks.
        moved: Entries that were moved so far.
        changes: Counts the changes of where rows are; a ``Window`` is valid until the next one.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        *,
        groups: Sequence[CacheGroup],
        margin: int,
    ) -> None:
        self.blocks: list[Block] = []
        self.moved = 0
        self.changes = 0
        self._growths: dict[frozenset[int], Growth] = {}
        self._lengths = lengths
        self._is_alone = len(lengths) == 1
        self._groups = tuple(groups)
        self._num_states = sum(group.count for group in groups)
        self._margin = margin

    @property
    def capacity(self) -> int:
        """Slots per row of the largest block; 0 if there is none."""
        return max((block.capacity for block in self.blocks), default=0)

    def holds(self, row: int) -> bool:
        """True if a row has a place."""
        return self._block_of(row) is not None

    def row(self, row: int) -> tuple[NDArray[np.generic], ...]:
        """The states of a row that has a place, by group: [n, N, C, d]."""
        block = self._block_of(row)
        assert block is not None
        place = block.rows.index(row)
        return tuple(group[:, place] for group in block.caches)

    def window(self, rows: Sequence[int]) -> Window | None:
        """The places of rows that were arranged together; None if they aren't beside each other any more."""
        block = self._block_of(rows[0])
        if block is None or not all(block.holds(row) for row in rows):
            return None
        places = [block.rows.index(row) for row in rows]
        start, stop = min(places), max(places) + 1
        if stop - start != len(rows):
            return None
        return Window(block, start, tuple(row for row in block.rows[start:stop] if row is not None))

    def arrange(self, rows: Sequence[int], capacity: int, *, exact: bool = False) -> Window:
        """Brings rows together, with room for at least ``capacity`` slots in each; all rows keep their entries.

        A new block has a quarter more than needed, if there is memory for that, so that rows seldom move. Rows leave a
        block that has more than twice what they need. The only row of a store gets and keeps little more than it needs:
        attention may read all of it in each step, and moving one row is cheap.

        Args:
            rows: The rows.
            capacity: Slots that each of them needs.
            exact: True if a new block has no more than needed, as where it is known that rows won't grow any further.

        Raises:
            BackendError: There is no memory for it; nothing has changed.
        """
        self._drop_outdated_growths()
        window = self.window(rows)
        if window is None or not self._fits(window.block, capacity):
            self.changes += 1
            block = self._fitting(rows, capacity)
            if block is not None:
                self._gather(block, rows)
            else:
                block = self._moved_to_new(rows, capacity, exact=exact)
            self._drop_empty(block)
            window = self.window(rows)
        assert window is not None
        return window

    def prepare_arrange(self, rows: Sequence[int], capacity: int, at_most: int) -> bool:
        """Fills about ``at_most`` slots of the new block that ``arrange`` would make, if it would make one.

        Until ``arrange`` is called, rows may append entries, but the entries that they have now may not change.

        Returns:
            True if ``arrange`` may be called now: little is left to copy, and this call has copied little.

        Raises:
            BackendError: There is no memory for it; nothing has changed.
        """
        self._drop_outdated_growths()
        window = self.window(rows)
        if (window is not None and self._fits(window.block, capacity)) or self._fitting(rows, capacity) is not None:
            return True
        if not any(self._lengths[row] for row in rows):
            return True
        growth = self._growth_of(rows, capacity)
        # All slots count, not only those with entries: the system clears new memory in whole pages.
        before = self.moved
        self._copy_some(growth, -(-at_most * self._num_states // growth.block.capacity))
        return growth.copied == len(rows) * self._num_states and self.moved - before <= at_most // LAST_MOVE

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` entries of a row to another one, which has room for them."""
        end = self._margin + length
        for new, old in zip(self.row(target), self.row(source), strict=True):
            new[:, :, :end] = old[:, :, :end]

    def clear(self) -> None:
        """Gives all memory back."""
        self.changes += 1
        self.blocks.clear()
        self._growths.clear()

    def _block_of(self, row: int) -> Block | None:
        return next((block for block in self.blocks if block.holds(row)), None)

    def _fitting(self, rows: Sequence[int], capacity: int) -> Block | None:
        """Finds a block that has places for these rows: of several the one that most of the rows are in."""
        best, most = None, -1
        for block in self.blocks:
            inside = sum(block.holds(row) for row in rows)
            room = inside + sum(self._is_vacant(row, rows) for row in block.rows)
            if self._fits(block, capacity) and room >= len(rows) and inside > most:
                best, most = block, inside
        return best

    def _is_vacant(self, row: int | None, wanted: Sequence[int]) -> bool:
        """True if a place with this row in it can be given to one of the wanted rows."""
        return row is None or (self._lengths[row] == 0 and row not in wanted)

    def _moved_to_new(self, rows: Sequence[int], capacity: int, *, exact: bool) -> Block:
        """Moves rows to a new block.

        It has one place for one row. For several rows it has a place for every row of the store, and rows that would
        stay behind in a block that these rows leave move along.
        """
        growth = self._growth_of(rows, capacity, exact=exact)
        self._copy_some(growth, len(rows) * self._num_states)
        del self._growths[frozenset(rows)]
        block = growth.block
        left = [other for other in self.blocks if any(other.holds(row) for row in rows)]
        self.blocks.append(block)
        for place, (row, copied) in enumerate(growth.lengths.items()):
            old = self._block_of(row)
            if old is not None:
                before = old.rows.index(row)
                # Entries that came after the copy, and those that were pending then, which may have changed.
                begin, end = copied, self._margin + int(self._lengths[row])
                for new, there in zip(block.caches, old.caches, strict=True):
                    new[:, place, :, begin:end] = there[:, before, :, begin:end]
                old.rows[before] = None
            block.rows[place] = row
        if len(rows) > 1:
            for other in left:
                self._vacate(other, block)
        return block

    def _growth_of(self, rows: Sequence[int], capacity: int, *, exact: bool = False) -> Growth:
        """The growth towards a block for these rows; a new one if there is none, or none that fits."""
        key = frozenset(rows)
        if key not in self._growths or not self._fits(self._growths[key].block, capacity):
            # A row can move to one place only.
            self._growths = {other: growth for other, growth in self._growths.items() if not other & key}
            self._drop_empty()
            block = self._allocated(1 if len(rows) == 1 else len(self._lengths), capacity, exact=exact)
            self._growths[key] = Growth({row: int(self._lengths[row]) for row in rows}, block)
        return self._growths[key]

    def _copy_some(self, growth: Growth, count: int) -> None:
        """Copies ``count`` more states; each is one state of one row."""
        for place, (row, length) in enumerate(growth.lengths.items()):
            first = growth.copied - place * self._num_states
            last = min(first + count, self._num_states)
            if last <= first:
                continue
            old = self._block_of(row)
            if old is not None and length:
                before, end = old.rows.index(row), self._margin + length
                for new, there, part in zip(growth.block.caches, old.caches, self._parts(first, last), strict=True):
                    new[part, place, :, :end] = there[part, before, :, :end]
                self.moved += -(-length * (last - first) // self._num_states)
            growth.copied += last - first
            count -= last - first

    def _parts(self, first: int, last: int) -> Iterator[slice]:
        """The part of each group that has the states from ``first`` up to ``last``, counted over all groups."""
        begin = 0
        for group in self._groups:
            yield slice(max(first - begin, 0), max(last - begin, 0))
            begin += group.count

    def _drop_outdated_growths(self) -> None:
        """Gives up growths with a row that was reset or truncated: it will hold another text."""
        self._growths = {
            rows: growth
            for rows, growth in self._growths.items()
            if all(self._lengths[row] >= length for row, length in growth.lengths.items())
            and any(growth.lengths.values())
        }

    def _vacate(self, old: Block, block: Block) -> None:
        """Moves the rows that are left in an old block to a new one that has places for all."""
        for row in [row for row in old.rows if row is not None and self._lengths[row]]:
            needed = self._margin + int(self._lengths[row])
            if needed <= block.capacity:
                self._move(row, block, block.rows.index(None))
            else:
                try:
                    alone = self._allocated(1, needed)
                except BackendError:
                    continue  # the row stays in the old block
                self.blocks.append(alone)
                self._move(row, alone, 0)

    def _drop_empty(self, kept: Block | None = None) -> None:
        """Gives back the blocks whose rows are all empty."""
        self.changes += 1
        holding = [
            block for block in self.blocks if any(row is not None and self._lengths[row] > 0 for row in block.rows)
        ]
        self.blocks = [block for block in self.blocks if block is kept or block in holding]

    def _allocated(self, places: int, needed: int, *, exact: bool = False) -> Block:
        failure = None
        for capacity in (needed,) if exact or self._is_alone else (needed + needed // 4, needed):
            slots = rounded_capacity(capacity)
            try:
                # Attention reads slots that hold no entry with weight 0, so they have to hold numbers. The system
                # gives zeros no memory before something is written.
                return Block(tuple(group.zeros(places, slots) for group in self._groups), [None] * places)
            except MemoryError as error:
                failure = error
        size = places * slots * sum(group.slot_bytes for group in self._groups)
        raise BackendError(
            f"There is no memory for {needed} slots in each of {places} rows: the caches take {size / 2**20:,.0f} MiB."
        ) from failure

    def _fits(self, block: Block, capacity: int) -> bool:
        """True if a block has enough slots, and not so much more than enough that steps would lose time on them."""
        most = rounded_capacity(capacity + capacity // 4) if self._is_alone else 2 * capacity + SPARE_SLOTS
        return capacity <= block.capacity <= most

    def _gather(self, block: Block, rows: Sequence[int]) -> None:
        """Moves rows into a block, and there beside each other."""
        for row in rows:
            if not block.holds(row):
                self._move(row, block, self._vacancy(block, rows))
        count = len(rows)
        inside = [row in rows for row in block.rows]
        start = max(range(len(inside) - count + 1), key=lambda start: sum(inside[start : start + count]))
        window = range(start, start + count)
        strays = [place for place, wanted in enumerate(inside) if wanted and place not in window]
        for place in window:
            if not inside[place]:
                self._swap(block, place, strays.pop())

    def _vacancy(self, block: Block, rows: Sequence[int]) -> int:
        """The vacant place that is nearest to the rows that are in the block already."""
        there = [place for place, row in enumerate(block.rows) if row in rows] or [0]
        vacant = [place for place, row in enumerate(block.rows) if self._is_vacant(row, rows)]
        return min(vacant, key=lambda place: min(abs(place - other) for other in there))

    def _move(self, row: int, block: Block, place: int) -> None:
        old = self._block_of(row)
        if old is not None:
            before = old.rows.index(row)
            self._copy_slots(old, before, block, place, int(self._lengths[row]))
            old.rows[before] = None
        block.rows[place] = row

    def _swap(self, block: Block, place: int, other: int) -> None:
        """Exchanges two places, the second of which has a row."""
        first, second = block.rows[place], block.rows[other]
        assert second is not None
        end = 0 if first is None or not self._lengths[first] else self._margin + int(self._lengths[first])
        kept = [group[:, place, :, :end].copy() for group in block.caches]
        self._copy_slots(block, other, block, place, int(self._lengths[second]))
        for group, entries in zip(block.caches, kept, strict=True):
            group[:, other, :, :end] = entries
        self.moved += end
        block.rows[place], block.rows[other] = second, first

    def _copy_slots(self, old: Block, before: int, new: Block, after: int, length: int) -> None:
        if length:
            end = self._margin + length
            for there, here in zip(new.caches, old.caches, strict=True):
                there[:, after, :, :end] = here[:, before, :, :end]
            self.moved += length

"""Where the caches of many rows lie: each row in one of a few blocks.

A step reads the caches of its rows from one block, where they lie one behind the other with the same capacity, and
attention reads all of that. But rows come and go, and one may be ten times as long as another. So rows that step
together are brought together, in a block that fits the longest of them. A row that steps by itself, because it is
taking in its prompt, gets a block of its own once it outgrows the others', which neither move nor read more for it. It
can be copied there bit by bit, so that the others need not wait for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.errors import BackendError

# Blocks have a multiple of this many slots per row.
CAPACITY_STEP = 64
# Slots per row that are not worth moving rows for, to give them back.
SPARE = 128


@dataclass(eq=False)
class Block:
    """Caches of one capacity.

    Attributes:
        caches: [2L, places, N, C, d], in the order of the contract.
        rows: The row in each place, None where there is none.
    """

    caches: NDArray[np.generic]
    rows: list[int | None]

    @property
    def capacity(self) -> int:
        """Slots per row (C)."""
        return int(self.caches.shape[3])

    def holds(self, row: int) -> bool:
        """Whether the row lies here."""
        return row in self.rows


@dataclass
class Growth:
    """A copy of a row in the making, in a larger block; the row stays where it is until that is complete.

    Attributes:
        row: The row.
        length: How many entries it has.
        block: Where it goes.
        copied: How many of its caches are there.
    """

    row: int
    length: int
    block: Block
    copied: int = 0


@dataclass(frozen=True)
class Window:
    """Neighbouring places of a block, and the rows in them, in that order."""

    block: Block
    start: int
    rows: tuple[int, ...]

    @property
    def caches(self) -> NDArray[np.generic]:
        """[2L, rows, N, C, d]; each cache is contiguous."""
        return self.block.caches[:, self.start : self.start + len(self.rows)]


class RowStore:
    """The caches of some rows.

    Args:
        lengths: Committed entries per row, [rows]; whoever runs steps keeps them up to date.
        num_caches: Caches of a row (2L).
        heads: Key/value heads (N).
        head_dim: Their size (d).
        margin: Slots in front of the first entry (M).
        dtype: What an entry consists of.

    Attributes:
        blocks: All there are.
        moved: Entries that were moved so far.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        *,
        num_caches: int,
        heads: int,
        head_dim: int,
        margin: int,
        dtype: np.dtype[np.generic],
    ) -> None:
        self.blocks: list[Block] = []
        self.moved = 0
        self._growth: Growth | None = None  # only as long as nobody was given the row's caches to write to
        self._lengths = lengths
        self._num_caches, self._heads, self._head_dim = num_caches, heads, head_dim
        self._margin = margin
        self._dtype = dtype

    @property
    def capacity(self) -> int:
        """Slots per row of the largest block; 0 if there is none."""
        return max((block.capacity for block in self.blocks), default=0)

    def row(self, row: int) -> NDArray[np.generic]:
        """The caches of a row that has a place, [2L, N, C, d]."""
        self._forget_growth([row])
        block = self._block_of(row)
        assert block is not None
        return block.caches[:, block.rows.index(row)]

    def window(self, rows: Sequence[int]) -> Window | None:
        """Where rows lie that were arranged together; None if they no longer do."""
        self._forget_growth(rows)
        return self._window(rows)

    def _window(self, rows: Sequence[int]) -> Window | None:
        block = self._block_of(rows[0])
        if block is None or not all(block.holds(row) for row in rows):
            return None
        places = [block.rows.index(row) for row in rows]
        start, stop = min(places), max(places) + 1
        if stop - start != len(rows):
            return None
        return Window(block, start, tuple(row for row in block.rows[start:stop] if row is not None))

    def arrange(self, rows: Sequence[int], capacity: int) -> Window:
        """Makes rows neighbours, with room for at least so many slots each; all rows keep what they hold.

        A block that is made for it has a quarter more, if there is memory for that, so that rows seldom move. One that
        has more than twice what is needed is left.

        Raises:
            BackendError: There is no memory for it; nothing has changed.
        """
        window = self._window(rows)
        if window is None or not _fits(window.block, capacity):
            block = self._fitting(rows, capacity)
            if block is not None:
                self._gather(block, rows)
            elif len(rows) == 1:
                block = self._move_alone(rows[0], capacity)
            else:
                block = self._move_together(rows, capacity)
            self._drop_empty(block)
        window = self.window(rows)
        assert window is not None
        return window

    def grow(self, row: int, capacity: int, at_most: int) -> bool:
        """Copies about so many entries of a row to where ``arrange`` is going to move it.

        What is copied is lost once the row's caches are asked for: nothing may be written before ``arrange``.

        Returns:
            Whether ``arrange`` will find nothing left to copy.

        Raises:
            BackendError: There is no memory for it; nothing has changed.
        """
        window = self._window([row])
        if window is None or _fits(window.block, capacity) or self._fitting([row], capacity) is not None:
            return True
        growth = self._growth_of(row, capacity)
        self._copy_some(growth, at_most)
        return growth.copied == self._num_caches

    def copy(self, source: int, target: int, length: int) -> None:
        """Gives a row, which has room for it, the first entries of another one."""
        end = self._margin + length
        self.row(target)[:, :, :end] = self.row(source)[:, :, :end]

    def clear(self) -> None:
        """Gives all memory back."""
        self.blocks.clear()
        self._growth = None

    def _block_of(self, row: int) -> Block | None:
        return next((block for block in self.blocks if block.holds(row)), None)

    def _fitting(self, rows: Sequence[int], capacity: int) -> Block | None:
        """A block that these rows are in or can move to: the one that most of them are in already."""
        best, most = None, -1
        for block in self.blocks:
            inside = sum(block.holds(row) for row in rows)
            room = inside + sum(self._is_vacant(row, rows) for row in block.rows)
            if _fits(block, capacity) and room >= len(rows) and inside > most:
                best, most = block, inside
        return best

    def _is_vacant(self, row: int | None, wanted: Sequence[int]) -> bool:
        """Whether a place with this row in it can be given to one that is wanted."""
        return row is None or (self._lengths[row] == 0 and row not in wanted)

    def _move_alone(self, row: int, capacity: int) -> Block:
        """To a new block of one place, which has what was copied there before."""
        growth = self._growth_of(row, capacity)
        self._copy_some(growth, None)
        old = self._block_of(row)
        if old is not None:
            old.rows[old.rows.index(row)] = None
        growth.block.rows[0] = row
        self.blocks.append(growth.block)
        return growth.block

    def _move_together(self, rows: Sequence[int], capacity: int) -> Block:
        """To a new block with places for all rows, and those with them that they would leave behind."""
        self._drop_empty()
        block = self._allocated(len(self._lengths), capacity)
        left = [other for other in self.blocks if any(other.holds(row) for row in rows)]
        self.blocks.append(block)
        self._gather(block, rows)
        for other in left:
            self._vacate(other, block)
        return block

    def _growth_of(self, row: int, capacity: int) -> Growth:
        """The row's growth, a new one if there is none that is of use."""
        growth, length = self._growth, int(self._lengths[row])
        if growth is None or (growth.row, growth.length) != (row, length) or not _fits(growth.block, capacity):
            self._growth = None
            self._drop_empty()
            growth = self._growth = Growth(row, length, self._allocated(1, capacity))
        return growth

    def _copy_some(self, growth: Growth, at_most: int | None) -> None:
        """Copies about so many entries, all if None; an entry counts in parts, one for each cache."""
        count = self._num_caches - growth.copied
        if at_most is not None and growth.length:
            count = min(count, -(-at_most * self._num_caches // growth.length))
        old = self._block_of(growth.row)
        if old is not None and growth.length:
            part, end = slice(growth.copied, growth.copied + count), self._margin + growth.length
            growth.block.caches[part, 0, :, :end] = old.caches[part, old.rows.index(growth.row), :, :end]
            self.moved += -(-growth.length * count // self._num_caches)
        growth.copied += count

    def _forget_growth(self, rows: Sequence[int]) -> None:
        """Whoever is given the caches of rows may change what was copied."""
        if self._growth is not None and self._growth.row in rows:
            self._growth = None

    def _vacate(self, old: Block, block: Block) -> None:
        """Moves the rows that others left behind, for a block with places for all: what it held is given back."""
        for row in [row for row in old.rows if row is not None and self._lengths[row]]:
            needed = self._margin + int(self._lengths[row])
            if needed <= block.capacity:
                self._move(row, block, block.rows.index(None))
            else:
                try:
                    alone = self._allocated(1, needed)
                except BackendError:
                    continue  # it may as well stay
                self.blocks.append(alone)
                self._move(row, alone, 0)

    def _drop_empty(self, kept: Block | None = None) -> None:
        """Gives back the blocks of rows that hold nothing."""
        if self._growth is not None and not self._lengths[self._growth.row]:
            self._growth = None
        holding = [
            block for block in self.blocks if any(row is not None and self._lengths[row] > 0 for row in block.rows)
        ]
        self.blocks = [block for block in self.blocks if block is kept or block in holding]

    def _allocated(self, places: int, needed: int) -> Block:
        failure = None
        for capacity in (needed + needed // 4, needed):
            slots = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
            shape = (self._num_caches, places, self._heads, slots, self._head_dim)
            try:
                # Slots that no token has reached are attended with weight 0, so they must hold numbers. Zeros take no
                # memory before something is written.
                return Block(np.zeros(shape, self._dtype), [None] * places)
            except MemoryError as error:
                failure = error
        size = int(np.prod(shape)) * self._dtype.itemsize
        raise BackendError(
            f"There is no room for {needed} entries in {places} rows: caches of {size / 2**20:.0f} MiB can't be had."
        ) from failure

    def _gather(self, block: Block, rows: Sequence[int]) -> None:
        """Brings rows into a block, and next to each other."""
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
        """The vacant place that is nearest to rows that are there already."""
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
        kept = block.caches[:, place, :, :end].copy()
        self._copy_slots(block, other, block, place, int(self._lengths[second]))
        block.caches[:, other, :, :end] = kept
        self.moved += end
        block.rows[place], block.rows[other] = second, first

    def _copy_slots(self, old: Block, before: int, new: Block, after: int, length: int) -> None:
        if length:
            end = self._margin + length
            new.caches[:, after, :, :end] = old.caches[:, before, :, :end]
            self.moved += length


def _fits(block: Block, capacity: int) -> bool:
    """Whether a block has so many slots, and not so many more that steps would waste their time on them."""
    return capacity <= block.capacity <= 2 * capacity + SPARE

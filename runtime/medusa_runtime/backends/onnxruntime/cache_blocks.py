"""Blocks of caches: places for rows that have the same capacity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CacheGroup:
    """The states of one shape and type.

    Attributes:
        count: The number of states (n).
        shape: The shape of an entry, [N, d].
        dtype: The type of its numbers.
    """

    count: int
    shape: tuple[int, int]
    dtype: np.dtype[np.generic]

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot of a row in all of these states."""
        heads, size = self.shape
        return self.count * heads * size * self.dtype.itemsize

    def zeros(self, places: int, slots: int) -> NDArray[np.generic]:
        """Empty caches, [n, places, N, C, d]."""
        heads, size = self.shape
        return np.zeros((self.count, places, heads, slots, size), self.dtype)


@dataclass(eq=False)
class Block:
    """Caches of one capacity.

    Attributes:
        caches: The states of each group, [n, places, N, C, d].
        rows: The row in each place, None where there is none.
    """

    caches: tuple[NDArray[np.generic], ...]
    rows: list[int | None]

    @property
    def capacity(self) -> int:
        """Slots per row (C)."""
        return int(self.caches[0].shape[3])

    def holds(self, row: int) -> bool:
        """True if the row is in this block."""
        return row in self.rows


@dataclass
class Growth:
    """A new block that is being filled with copies of rows, which stay elsewhere until it is complete.

    Attributes:
        lengths: The number of entries to copy, by row. A row that becomes shorter makes the copy useless.
        block: The new block; the rows get its places in the order of ``lengths``.
        copied: The number of states that have been copied, those of the first row first.
    """

    lengths: dict[int, int]
    block: Block
    copied: int = 0


@dataclass(frozen=True)
class Window:
    """Neighbouring places of a block.

    Attributes:
        block: The block.
        start: The first place.
        rows: The rows in these places, in their order.
    """

    block: Block
    start: int
    rows: tuple[int, ...]

    @property
    def caches(self) -> tuple[NDArray[np.generic], ...]:
        """The states of each group, [n, rows, N, C, d]; each state is contiguous."""
        return tuple(group[:, self.start : self.start + len(self.rows)] for group in self.block.caches)

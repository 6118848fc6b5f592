"""Where rows' caches lie: whatever is moved, no row loses an entry, and memory is given back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from medusa_runtime import BackendError
from medusa_runtime.backends.row_store import CAPACITY_STEP, SPARE, RowStore

MARGIN = 2


def make_store(rows: int, *, num_caches: int = 2) -> tuple[RowStore, np.ndarray]:
    lengths = np.zeros(rows, np.int64)
    dtype = np.dtype(np.float32)
    return RowStore(lengths, num_caches=num_caches, heads=1, head_dim=1, margin=MARGIN, dtype=dtype), lengths


class Laws(RuleBasedStateMachine):
    """What each row holds is a list of numbers, as if nothing were ever moved."""

    @initialize(rows=st.integers(1, 5))
    def start(self, rows: int) -> None:
        self.store, self.lengths = make_store(rows)
        self.entries: list[list[float]] = [[] for _ in range(rows)]
        self.written = 0

    @rule(data=st.data(), count=st.integers(0, 150))
    def step(self, data: st.DataObject, count: int) -> None:
        rows = data.draw(st.lists(st.sampled_from(range(len(self.lengths))), min_size=1, unique=True))
        needed = MARGIN + int(self.lengths[rows].max()) + count
        window = self.store.arrange(rows, needed)
        assert sorted(window.rows) == sorted(rows)
        assert window.caches.shape[1] == len(rows)
        assert needed <= window.block.capacity <= max(2 * needed + SPARE, 2 * CAPACITY_STEP)
        for place, row in enumerate(window.rows):
            new = [float(self.written + i) for i in range(count)]
            self.written += count
            begin = MARGIN + int(self.lengths[row])
            window.caches[:, place, 0, begin : begin + count, 0] = new
            self.entries[row] += new
            self.lengths[row] += count

    @rule(data=st.data(), count=st.integers(0, 150), at_most=st.integers(1, 100))
    def grow(self, data: st.DataObject, count: int, at_most: int) -> None:
        row = data.draw(st.sampled_from(range(len(self.lengths))))
        before = self.store.moved
        done = self.store.grow(row, MARGIN + int(self.lengths[row]) + count, at_most)
        assert done or self.store.moved - before >= at_most

    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(range(len(self.lengths))))
        length = data.draw(st.integers(0, int(self.lengths[row])))
        self.lengths[row] = length
        del self.entries[row][length:]

    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        row, source = (data.draw(st.sampled_from(range(len(self.lengths)))) for _ in range(2))
        length = data.draw(st.integers(0, int(self.lengths[source])))
        if row != source and length:
            self.lengths[row] = 0
            self.store.arrange([row], MARGIN + length)
            self.store.copy(source, row, length)
            self.lengths[row] = length
            self.entries[row] = self.entries[source][:length]

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "store"):
            return
        for row, entries in enumerate(self.entries):
            if entries:
                held = self.store.row(row)[:, 0, MARGIN : MARGIN + len(entries), 0]
                assert np.array_equal(held, [entries] * 2)

    @invariant()
    def a_row_has_one_place(self) -> None:
        if hasattr(self, "store"):
            placed = [row for block in self.store.blocks for row in block.rows if row is not None]
            assert len(placed) == len(set(placed))
            assert len(self.store.blocks) <= len(self.lengths) + 1


TestLaws = Laws.TestCase
TestLaws.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_a_long_prompt_leaves_the_others_where_they_are() -> None:
    store, lengths = make_store(4)
    store.arrange([0, 1, 2], 100)
    lengths[:3] = 90
    block = store.window([0, 1, 2]).block
    for length in range(0, 2000, 64):
        store.arrange([3], MARGIN + length + 64)
        lengths[3] = length + 64
        assert store.arrange([0, 1, 2], 100).block is block
    assert store.row(3).shape[2] > 1900


def test_a_row_grows_bit_by_bit() -> None:
    store, lengths = make_store(2, num_caches=10)
    store.arrange([0], 1000)
    lengths[0] = 900
    store.window([0]).caches[:] = np.arange(10)[:, None, None, None, None]
    moved = []
    while not store.grow(0, 2000, 200):
        moved.append(store.moved - sum(moved))
        assert store.blocks[0].holds(0)
    assert moved == [270, 270, 270]  # three caches of ten at a time
    assert store.arrange([0], 2000).block.capacity > 2000
    assert store.moved == 900
    assert (store.row(0)[:, 0, MARGIN : MARGIN + 900, 0] == np.arange(10)[:, None]).all()


def test_what_is_written_meanwhile_is_not_lost() -> None:
    """A row that was half copied begins anew, with as many entries as before: all are copied again."""
    store, lengths = make_store(2, num_caches=10)
    store.arrange([0], 1000)
    lengths[0] = 900
    store.row(0)[:] = 1
    assert not store.grow(0, 2000, 200)
    for write in (store.row(0), store.window([0]).caches):
        write[:] = 2
        store.grow(0, 2000, 200)
    store.arrange([0], 2000)
    assert (store.row(0)[:, 0, MARGIN : MARGIN + 900] == 2).all()


def test_memory_comes_back() -> None:
    store, lengths = make_store(2)
    store.arrange([0, 1], 1000)
    lengths[:] = 990
    lengths[:] = [0, 50]
    assert store.arrange([0, 1], 60).block.capacity < 200
    assert store.capacity < 200
    store.clear()
    assert store.capacity == 0


def test_no_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store, lengths = make_store(3)
    store.arrange([0, 1], 60)
    lengths[:2] = 50
    before = [list(block.rows) for block in store.blocks]
    allocate = np.zeros

    def zeros(shape: tuple[int, ...], dtype: object) -> np.ndarray:
        if shape[3] > 640:
            raise MemoryError
        return allocate(shape, dtype)

    monkeypatch.setattr(np, "zeros", zeros)
    with pytest.raises(BackendError, match="no room for 1000 entries in 3 rows"):
        store.arrange([0, 1], 1000)
    assert [list(block.rows) for block in store.blocks] == before
    assert store.arrange([0, 1], 600).block.capacity == 640  # where a quarter more can't be had


@given(st.lists(st.sets(st.integers(0, 7), min_size=1), min_size=1, max_size=8))
@settings(deadline=None)
def test_rows_are_compact_whoever_takes_part(groups: list[set[int]]) -> None:
    store, lengths = make_store(8)
    store.arrange(range(8), 50)
    lengths[:] = 30
    for row in range(8):
        store.row(row)[:, 0, MARGIN : MARGIN + 30] = row
    for rows in groups:
        window = store.arrange(sorted(rows), 50)
        assert set(window.rows) == rows
        for place, row in enumerate(window.rows):
            assert (window.caches[:, place, 0, MARGIN : MARGIN + 30] == row).all()
    assert len(store.blocks) == 1

"""The places of rows' caches: no move loses an entry, and free memory is given back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from medusa_runtime import BackendError
from medusa_runtime.backends.onnxruntime.cache_blocks import CacheGroup
from medusa_runtime.backends.onnxruntime.row_store import RowStore
from medusa_runtime.tuning import CAPACITY_STEP, SPARE_SLOTS

MARGIN = 2


FLOAT, INTEGER = np.dtype(np.float32), np.dtype(np.int32)
TEN = [CacheGroup(7, (1, 1), FLOAT), CacheGroup(3, (1, 1), FLOAT)]
GROUPS = [CacheGroup(2, (1, 1), FLOAT), CacheGroup(1, (3, 2), INTEGER)]


def make_store(rows: int, *, groups: list[CacheGroup] | None = None) -> tuple[RowStore, np.ndarray]:
    lengths = np.zeros(rows, np.int64)
    return RowStore(lengths, groups=groups or GROUPS, margin=MARGIN), lengths


def fill(store: RowStore, row: int, value: float) -> None:
    """Writes a value to all slots of a row."""
    for group in store.row(row):
        group[:] = value


class Laws(RuleBasedStateMachine):
    """The model of the store: each row is a list of numbers, which moves don't change."""

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
        assert [group.shape[:2] for group in window.caches] == [(group.count, len(rows)) for group in GROUPS]
        assert [group.dtype for group in window.caches] == [group.dtype for group in GROUPS]
        assert needed <= window.block.capacity <= max(2 * needed + SPARE_SLOTS, 2 * CAPACITY_STEP)
        for place, row in enumerate(window.rows):
            new = [float(self.written + i) for i in range(count)]
            self.written += count
            begin = MARGIN + int(self.lengths[row])
            for group in window.caches:
                group[:, place, :, begin : begin + count] = np.reshape(new, (-1, 1))
            self.entries[row] += new
            self.lengths[row] += count

    @rule(data=st.data(), count=st.integers(0, 150), at_most=st.integers(1, 300))
    def prepare_arrange(self, data: st.DataObject, count: int, at_most: int) -> None:
        rows = data.draw(st.lists(st.sampled_from(range(len(self.lengths))), min_size=1, unique=True))
        before = self.store.moved
        needed = MARGIN + int(self.lengths[rows].max()) + count
        if self.store.prepare_arrange(rows, needed, at_most):
            assert self.store.moved - before <= at_most
            self.store.arrange(rows, needed)

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
                for group in self.store.row(row):
                    held = group[:, :, MARGIN : MARGIN + len(entries)]
                    assert np.array_equal(held, np.broadcast_to(np.reshape(entries, (-1, 1)), held.shape))

    @invariant()
    def a_row_has_one_place(self) -> None:
        if hasattr(self, "store"):
            placed = [row for block in self.store.blocks for row in block.rows if row is not None]
            assert len(placed) == len(set(placed))
            assert len(self.store.blocks) <= len(self.lengths) + 1


TestLaws = pytest.mark.slow(Laws.TestCase)
TestLaws.settings = settings(max_examples=200, stateful_step_count=30)


def test_a_long_prompt_leaves_the_others_where_they_are() -> None:
    store, lengths = make_store(4)
    store.arrange([0, 1, 2], 100)
    lengths[:3] = 90
    block = store.window([0, 1, 2]).block
    for length in range(0, 2000, 64):
        store.arrange([3], MARGIN + length + 64)
        lengths[3] = length + 64
        assert store.arrange([0, 1, 2], 100).block is block
    assert store.row(3)[0].shape[2] > 1900


def rows_of_ten(store: RowStore, row: int) -> np.ndarray:
    """The ten states of a row, [10, slots]."""
    return np.concatenate([group[:, 0, :, 0] for group in store.row(row)])


def test_rows_move_bit_by_bit_and_go_on_meanwhile() -> None:
    for rows in ([0], [0, 2, 1]):
        store, lengths = make_store(3, groups=TEN)
        for row in rows:
            store.arrange([row], 1000)
            lengths[row] = 900
            first, second = store.row(row)
            first[:] = 10 * row + np.arange(7)[:, None, None, None]
            second[:] = 10 * row + np.arange(7, 10)[:, None, None, None]
        moved, turns = 0, 0
        while not store.prepare_arrange(rows, 2000, 600):
            assert store.moved - moved <= 300  # three states of ten at a time, of a block twice as long
            moved, turns = store.moved, turns + 1
            for row in rows:
                for group in store.row(row):
                    group[:, 0, MARGIN + lengths[row]] = -turns
                lengths[row] += 1
        assert turns >= 3 * len(rows)
        window = store.arrange(rows, 2000)
        assert window.block.capacity > 2000 and window.rows == tuple(rows)
        assert store.moved == moved == 900 * len(rows)
        for row in rows:
            held = rows_of_ten(store, row)[:, MARGIN : MARGIN + lengths[row]]
            assert (held[:, :900] == 10 * row + np.arange(10)[:, None]).all()
            np.testing.assert_array_equal(held[:, 900:], [range(-1, -turns - 1, -1)] * 10)


def test_what_is_pending_may_change_meanwhile() -> None:
    """The next step writes the last M entries again."""
    store, lengths = make_store(1, groups=TEN)
    store.arrange([0], 1000)
    lengths[0] = 900
    assert not store.prepare_arrange([0], 2000, 600)
    for group in store.row(0):
        group[:, 0, 900 : 900 + MARGIN] = 5
    store.arrange([0], 2000)
    assert (rows_of_ten(store, 0)[:, 900 : 900 + MARGIN] == 5).all()


def test_a_row_that_begins_anew_is_copied_anew() -> None:
    store, lengths = make_store(2, groups=TEN)
    store.arrange([0], 1000)
    lengths[0] = 900
    fill(store, 0, 1)
    assert not store.prepare_arrange([0], 2000, 600)
    lengths[0] = 0
    store.arrange([0], 1000)
    fill(store, 0, 2)
    lengths[0] = 950
    store.arrange([0], 2000)
    assert (rows_of_ten(store, 0)[:, MARGIN : MARGIN + 950] == 2).all()


def test_two_growths_at_a_time() -> None:
    store, lengths = make_store(3, groups=TEN)
    for row in range(3):
        store.arrange([row], 1000)
        lengths[row] = 900
    for _ in range(100):
        done = [store.prepare_arrange(rows, 2000, 600) for rows in ([0, 1], [2])]
        if all(done):
            break
    assert all(done)
    assert store.moved == 2700


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
    with pytest.raises(BackendError, match="no memory for 1000 slots in each of 3 rows"):
        store.arrange([0, 1], 1000)
    assert [list(block.rows) for block in store.blocks] == before
    assert store.arrange([0, 1], 600).block.capacity == 640  # there is no memory for a quarter more


@given(st.lists(st.sets(st.integers(0, 7), min_size=1), min_size=1, max_size=8))
def test_rows_are_compact_whoever_takes_part(groups: list[set[int]]) -> None:
    store, lengths = make_store(8)
    store.arrange(range(8), 50)
    lengths[:] = 30
    for row in range(8):
        fill(store, row, row)
    for rows in groups:
        window = store.arrange(sorted(rows), 50)
        assert set(window.rows) == rows
        for place, row in enumerate(window.rows):
            assert all((group[:, place, :, MARGIN : MARGIN + 30] == row).all() for group in window.caches)
    assert len(store.blocks) == 1

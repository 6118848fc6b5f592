"""Slots of caches: trees that keep to a panel."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from medusa_runtime import Tree
from medusa_runtime.bundles.slots import PANEL, SlotLayout
from medusa_runtime.tuning import CAPACITY_STEP
from support.trees import rank_paths


def test_caches_are_whole_panels() -> None:
    assert CAPACITY_STEP % PANEL == 0


@given(paths=rank_paths(), length=st.integers(0, 300), size=st.integers(1, 64), panel=st.sampled_from([4, 16, 64]))
def test_paths_of_a_tree_are_in_the_panels_of_plain_decoding(
    paths: list[tuple[int, ...]], length: int, size: int, panel: int
) -> None:
    tree = Tree.from_paths(paths)
    layout = SlotLayout(tree.max_depth)
    size = min(size, tree.size)
    fitting = layout.size_within_panel(length, size, panel)
    assert 1 <= fitting <= size
    nodes = [(), *(tuple(path) for path in tree.paths)]
    for path in nodes[:fitting]:
        for depth in range(len(path) + 1):
            slot = layout.slot(length + nodes.index(path[:depth]))
            assert slot // panel == layout.slot(length + depth) // panel


@given(length=st.integers(0, 300), size=st.integers(1, 64), margin=st.integers(0, 8))
def test_trees_are_no_smaller_than_needed(length: int, size: int, margin: int) -> None:
    fitting = SlotLayout(margin).size_within_panel(length, size, PANEL)
    if fitting < size:
        first = margin + length
        assert (first + fitting) % PANEL == 0
        assert fitting > 1

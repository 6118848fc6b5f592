"""Laws of trees, and trees that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.trees.named import load_tree, reference_trees
from medusa_export.verification.oracle import oracle_tree
from medusa_runtime import Tree, TreeError
from support.trees import rank_paths


@given(rank_paths())
def test_laws(paths: list[tuple[int, ...]]) -> None:
    tree = Tree.from_paths(paths)
    assert sorted(tree.paths) == sorted(paths)
    assert all(tree.parents[node] < node for node in range(1, tree.size))
    for size in range(1, tree.size + 1):
        prefix = tree.prefix(size)
        assert Tree.from_paths(prefix.paths) == prefix
        np.testing.assert_array_equal(prefix.ancestor_mask, tree.ancestor_mask[:size, :size])
        np.testing.assert_array_equal(prefix.depths, tree.depths[:size])
    np.testing.assert_array_equal(tree.ancestor_mask.sum(1), tree.depths + 1)
    for node in range(tree.size):
        path = tree.node_paths[node, : tree.depths[node] + 1]
        assert set(path.tolist()) == set(np.flatnonzero(tree.ancestor_mask[node]).tolist())


@given(rank_paths(), st.data())
def test_an_oracle_tree_is_right_up_to_its_node(paths: list[tuple[int, ...]], data: st.DataObject) -> None:
    tree = Tree.from_paths(paths)
    node = data.draw(st.integers(0, tree.size - 1))
    rest = data.draw(st.lists(st.integers(0, 49), min_size=5, max_size=5))
    ids = oracle_tree(tree, 7, rest, node, 50)
    right = [n for n in range(1, tree.size) if ids[n] == rest[tree.depths[n] - 1]]
    assert set(right) == set(tree.node_paths[node, 1 : tree.depths[node] + 1].tolist())


def test_the_example_of_the_method() -> None:
    paths = sorted([[0], [0, 0], [0, 1], [0, 2], [1], [1, 0], [1, 1], [1, 2]], key=lambda path: (len(path), path))
    tree = Tree.from_paths(paths)
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 2, 2, 2]
    leaves = {tuple(path) for path in tree.node_paths[3:].tolist()}
    assert leaves == {(0, 2, 8), (0, 2, 7), (0, 2, 6), (0, 1, 5), (0, 1, 4), (0, 1, 3)}


def test_reference_trees() -> None:
    names = reference_trees()
    assert len(names) == 9
    for name in names:
        tree = load_tree(name, num_heads=5, top_k=10).tree
        assert tree.size == 64
        assert tree.top_k <= 10
        assert tree.max_depth <= 4
    assert load_tree("default", num_heads=2, top_k=10).tree.max_depth == 2


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ([[0, 0]], "not prefix-closed"),
        ([[0], [0]], "twice"),
        ([[]], "non-empty"),
        ([[-1]], "-1"),
        ([["a"]], "'a'"),
        ([[True]], "True"),
        ([5], "5"),
    ],
)
def test_refused(paths: list[object], words: str) -> None:
    with pytest.raises(TreeError, match=words):
        Tree.from_paths(paths)


def test_prefixes_are_bounded() -> None:
    with pytest.raises(TreeError, match="choose 1 to 2"):
        Tree.from_paths([[0]]).prefix(3)

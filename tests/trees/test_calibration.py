"""Calibration and tree search."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.cli import main
from medusa_export.common.errors import DatasetError
from medusa_export.trees.calibration import Calibration
from medusa_export.trees.prior import TOP_1, rank_accuracy
from medusa_export.trees.search import search_tree
from medusa_runtime.bundles.tree import Tree

PLACES = np.array([[0, 1, 0], [0, 0, -1], [3, 0, 0], [10, 2, 1], [0, 1, 2], [1, -1, -1]])


def test_only_targets_that_exist_are_counted() -> None:
    calibration = Calibration.count(PLACES, 10)
    assert calibration.accuracies[0][:4] == (3 / 6, 1 / 6, 0, 1 / 6)
    assert calibration.accuracies[1][:3] == (2 / 5, 2 / 5, 1 / 5)
    assert calibration.accuracies[2][:3] == (2 / 4, 1 / 4, 1 / 4)
    # Head 2 was right in the fourth row. But head 1 was wrong there, so the node can't be accepted.
    assert calibration.paths[0, 1] == 2 / 5
    assert calibration.value((0, 1, 0)) == 1 / 4
    assert calibration.value((5,)) == 0
    with pytest.raises(DatasetError, match="too short"):
        Calibration.count(np.array([[0, -1]]), 10)


def test_where_only_lookup_hits_are_right() -> None:
    places = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [9, 9, 9, -1], [9, 9, 9, -1]])
    calibration = Calibration.count(places[:, :3], 4, steps=places, hits=np.array([True, True, False, False]))
    assert not calibration.paths and calibration.hit_paths[(0,) * 4] == 1
    assert calibration.value((0,), hit=False) == 0
    assert search_tree(calibration, 10).max_depth == 4


def test_round_trip_and_bad_files(tmp_path: Path) -> None:
    calibration = Calibration.count(PLACES, 10, model="m", heads="h")
    calibration.save(tmp_path / "c.json")
    again = Calibration.load(tmp_path / "c.json")
    assert again.value((0, 1)) == pytest.approx(calibration.value((0, 1)), abs=1e-6)
    assert (again.model, again.heads, again.positions) == ("m", "h", 6)
    for text, words in (
        ('{"accuracies": 3}', "'accuracies': expected `array`, got `int`"),
        ('{"accuracies": []}', "'accuracies': expected `array` of length >= 1"),
        ('{"accuracies": [[]]}', r"'accuracies\[0\]': expected `array` of length >= 1"),
        ('{"accuracies": [[1e9]]}', "expected `float` <= 1"),
        ('{"accuracies": [[0.5]], "paths": [[[-1], 0.5]]}', "expected `int` >= 0"),
        ("[" * 10_000, "medusa-export calibrate"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DatasetError, match=words):
            Calibration.load(tmp_path / "bad.json")
    with pytest.raises(DatasetError, match="No such file"):
        Calibration.load(tmp_path / "none.json")
    with pytest.raises(DatasetError, match="measured 3 heads and ranks below 10"):
        calibration.acceptance(Tree(((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0))))


def vicuna() -> Calibration:
    """Published top-1 and top-5 accuracies. Ranks 1 to 4 share the difference, as in the prior."""
    return Calibration(tuple(tuple(rank_accuracy(head, rank) for rank in range(5)) for head in range(len(TOP_1))))


@pytest.mark.parametrize(("size", "expected"), [(5, 1.96), (10, 2.13), (15, 2.21), (31, 2.32), (63, 2.38)])
def test_the_figures_of_the_paper(size: int, expected: float) -> None:
    calibration = vicuna()
    tree = search_tree(calibration, size + 1)
    assert tree.size == size + 1
    assert calibration.acceptance(tree).expected_tokens(tree.size) == pytest.approx(expected, abs=0.01)


def random_calibration(draw: st.DrawFn) -> Calibration:
    heads = draw(st.integers(1, 3))
    ranks = draw(st.integers(1, 3))
    chance = st.floats(0.01, 1.0 / ranks)
    return Calibration(tuple(tuple(draw(chance) for _ in range(ranks)) for _ in range(heads)))


@settings(max_examples=60)
@given(st.composite(random_calibration)(), st.integers(2, 6))
def test_every_prefix_is_the_best_tree_of_its_size(calibration: Calibration, size: int) -> None:
    """Compares the tree with all other trees of its size."""
    nodes = [
        path
        for depth in range(1, len(calibration.accuracies) + 1)
        for path in itertools.product(range(calibration.top_k), repeat=depth)
    ]
    tree = search_tree(calibration, size)
    values = calibration.acceptance(tree)
    for count in range(1, tree.size):
        if len(nodes) ** count > 20_000:
            break
        best = max(
            sum(calibration.value(path) for path in chosen)
            for chosen in itertools.combinations(nodes, count)
            if all(path[:-1] in chosen or len(path) == 1 for path in chosen)
        )
        assert values.expected_tokens(count + 1) == pytest.approx(1 + best, abs=1e-5)


def test_the_command(tmp_path: Path) -> None:
    vicuna().save(tmp_path / "c.json")
    arguments = ["tree", str(tmp_path / "c.json"), "--size", "11", "-o", str(tmp_path / "t.json"), "--draw", "-q"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "└─" in result.output
    paths = json.loads((tmp_path / "t.json").read_text())
    assert Tree.from_paths(paths) == search_tree(vicuna(), 11)

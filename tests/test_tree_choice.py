"""Which tree is chosen: what pays by table and by what was accepted, and never one that doesn't."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_runtime.bundle import Acceptance
from medusa_runtime.latency import LatencyTable
from medusa_runtime.tree_choice import MARGIN, TreeChoice

ACCEPTANCE = Acceptance("calibrated", (1.0, 0.6, 0.3, 0.1))


def choice(*seconds: float) -> TreeChoice:
    return TreeChoice(ACCEPTANCE, {4: LatencyTable(dict(zip((1, 2, 4), seconds, strict=False)))})


def test_a_tree_has_to_pay() -> None:
    assert choice(1.0, 1.3, 1.9).size(4) == 2
    assert choice(1.0, 1.3, 1.5).size(3) == 4
    assert choice(1.0, 1.59, 2.5).size(4) == 1  # less than can be told from noise
    assert choice(1.0, 1.3, 1.5).size(5) == 1  # nobody has measured so many rows


def test_guesses_that_fail_end_the_tree_and_it_is_tried_again() -> None:
    tree = choice(1.0, 1.3, 2.5)
    assert tree.size(4) == 2
    steps = 0
    while tree.size(4) == 2:
        tree.observe(2, [1, 1, 1, 1])
        steps += 1
    assert steps < 60
    assert tree.accuracy < 0.51
    idle = 0
    while tree.size(4) == 1:
        tree.observe(1, [1, 1, 1, 1])
        idle += 1
    assert idle > 10 * steps  # trying costs little


def test_guesses_that_hold_make_it_larger() -> None:
    tree = choice(1.0, 1.5, 1.9)
    assert tree.size(4) == 2
    for _ in range(200):
        tree.observe(2, [2, 2, 2, 2])
    assert tree.accuracy == pytest.approx(1 / 0.6, rel=0.1)
    assert tree.size(4) == 4


@given(st.lists(st.floats(0.5, 5), min_size=3, max_size=3), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_it_is_never_slower_by_its_own_account(seconds: list[float], chance: float, seed: int) -> None:
    tree, rng = choice(*seconds), np.random.default_rng(seed)
    for _ in range(50):
        size = tree.size(4)
        rate = (1 + tree.accuracy * (ACCEPTANCE.expected_tokens(size) - 1)) / dict(
            zip((1, 2, 4), seconds, strict=True)
        )[size]
        assert rate * (1 + MARGIN) >= 1 / seconds[0]
        assert size == 1 or rate >= 1 / seconds[0]
        tree.observe(size, (1 + (rng.random(4) < chance) * (size > 1)).tolist())

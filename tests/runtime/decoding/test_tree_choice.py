"""Tree choice: by step times and counted acceptance, and never a tree that is slower than plain decoding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_runtime.bundles.facts import Acceptance
from medusa_runtime.bundles.tree import Tree
from medusa_runtime.decoding.latency import LatencyTable
from medusa_runtime.decoding.tree_choice import TreeChoice
from medusa_runtime.tuning import FIRST_ACCURACY, LEAST_GAIN

ACCEPTANCE = Acceptance("calibrated", (1.0, 0.6, 0.3, 0.1))


CHAIN = Tree(((0,), (0, 0), (0, 0, 0)))


def choice(*seconds: float, acceptance: Acceptance = ACCEPTANCE) -> TreeChoice:
    return TreeChoice(acceptance, CHAIN, {4: LatencyTable(dict(zip((1, 2, 4), seconds, strict=False)))})


def size(tree: TreeChoice, rows: int = 4) -> int:
    return tree.size(range(rows))


def test_a_tree_has_to_pay() -> None:
    assert size(choice(1.0, 1.3, 1.9)) == 2
    assert size(choice(1.0, 1.3, 1.5), rows=3) == 4
    assert size(choice(1.0, 1.59, 2.5)) == 1  # less than the noise of a measurement
    assert size(choice(1.0, 1.3, 1.5), rows=5) == 1  # this number of rows has not been measured


def test_rejected_drafts_end_a_tree_and_it_is_tried_again() -> None:
    tree = choice(1.0, 1.3, 2.5)
    assert size(tree) == 2
    steps = 0
    while size(tree) == 2:
        tree.observe(2, dict.fromkeys(range(4), 1))
        steps += 1
    assert steps < 60
    assert tree.accuracy_of(0, hit=False) < 0.51
    idle = 0
    while size(tree) == 1:
        tree.observe(1, dict.fromkeys(range(4), 1))
        idle += 1
    assert idle > 10 * steps  # trying costs little


def test_accepted_drafts_make_a_tree_larger() -> None:
    tree = choice(1.0, 1.4, 1.9)
    assert size(tree) == 2
    for _ in range(200):
        tree.observe(2, dict.fromkeys(range(4), 2))
    assert tree.accuracy(hit=False) == pytest.approx(1 / 0.6, rel=0.1)
    assert size(tree) == 4


def test_a_request_that_is_hard_to_draft_for_has_its_own_count() -> None:
    tree = choice(1.0, 1.3, 1.5)
    for _ in range(40):
        tree.observe(4, {0: 1, 1: 3, 2: 3, 3: 3})
    assert tree.size([1, 2, 3]) == 4
    assert tree.size([0]) == 1
    tree.begin(0)
    assert tree.accuracy_of(0, hit=False) == tree.accuracy(hit=False)
    assert tree.size([0]) == 4


@pytest.mark.parametrize("accuracy", [0.5, 0.8, 1.1])
def test_accuracy_is_found_from_trees_of_any_depth(accuracy: float) -> None:
    """If one factor corrects all depths, trees of all sizes find that factor, and with it the expected tokens."""
    rng, tree = np.random.default_rng(0), choice(1.0, 1.1, 1.2)
    counts = []
    for step in range(20_000):
        nodes = (2, 4)[step % 2]
        conditional = np.array([0.6, 0.5, 1 / 3])[: nodes - 1]
        right = np.cumprod(rng.random(nodes - 1) < accuracy * conditional)
        tree.observe(nodes, {0: 1 + int(right.sum())})
        if nodes == 4:
            counts.append(1 + right.sum())
    assert tree.accuracy(hit=False) == pytest.approx(accuracy, rel=0.05)
    assert tree.expected_tokens(4, accuracy) == pytest.approx(np.mean(counts), rel=0.02)


@given(st.lists(st.floats(0.5, 5), min_size=3, max_size=3), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_it_is_never_slower_by_its_own_account(seconds: list[float], chance: float, seed: int) -> None:
    tree, rng = choice(*seconds), np.random.default_rng(seed)
    for _ in range(50):
        accuracies = [tree.accuracy_of(row, hit=False) for row in range(4)]
        nodes = tree.size(range(4))
        taken = dict(zip((1, 2, 4), seconds, strict=True))
        rate = sum(tree.expected_tokens(nodes, accuracy) for accuracy in accuracies) / taken[nodes]
        assert rate * (1 + LEAST_GAIN) >= 4 / seconds[0]
        assert nodes == 1 or rate >= 4 / seconds[0]
        tree.observe(nodes, {row: 1 + (rng.random() < chance) * (nodes > 1) for row in range(4)})


# Measured times of steps of SmolLM2 on one thread of a Xeon, as multiples of a plain step.
TABLES = {
    "int4": {1: 1.0, 2: 1.24, 3: 1.51, 4: 1.79, 6: 2.35},
    "fp32": {1: 1.0, 2: 1.14, 3: 1.19, 4: 1.24, 6: 1.32},
}


def speed(tree: TreeChoice | int, right: float, seconds: dict[int, float], answers: int, seed: int) -> float:
    """Tokens per plain step's time, over answers of 128 tokens whose drafts are right with one chance at each depth."""
    rng, tokens, taken = np.random.default_rng(seed), 0, 0.0
    for _ in range(answers):
        left, drafted = 128, True
        if isinstance(tree, TreeChoice):
            tree.begin(0)
        while left > 0:
            nodes = tree if isinstance(tree, int) else tree.size([0])
            accepted = int(np.cumprod(rng.random(nodes - 1) < right).sum()) if drafted else 0
            if isinstance(tree, TreeChoice):
                tree.observe(nodes, {0: 1 + accepted})
            tokens, left, taken = tokens + 1 + accepted, left - 1 - accepted, taken + seconds[nodes]
            drafted = nodes > 1  # a plain step drafts nothing
    return tokens / taken


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("right", [0.02, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7])
def test_it_is_as_fast_as_the_best_size(table: str, right: float) -> None:
    """Decoding is within 2 % of the best fixed size, and within 10 % in the first answer.

    The best size may be one, which is plain decoding. The bundle promises that a draft is right with a chance of 0.55.
    """
    seconds, chain = TABLES[table], Tree(tuple((0,) * depth for depth in range(1, 6)))
    promised = Acceptance("calibrated", tuple(0.55**depth for depth in range(6)))
    tree = TreeChoice(promised, chain, {1: LatencyTable(seconds)})
    first = speed(tree, right, seconds, 1, seed=1)
    chosen = speed(tree, right, seconds, 20, seed=2)
    best = max(speed(size, right, seconds, 20, seed=2) for size in seconds)
    assert chosen > 0.98 * best
    assert first > 0.9 * best


def test_steps_with_a_lookup_hit_have_a_size_and_a_count_of_their_own() -> None:
    told = Acceptance("calibrated", (1.0, 0.3, 0.1, 0.0), (1.0, 0.9, 0.85, 0.8), 0.25)
    tree = choice(1.0, 1.35, 1.6, acceptance=told)
    assert tree.size([0, 1]) == 1
    assert tree.size([0, 1], hits=[0, 1]) == 4
    assert tree.size([0, 1], hits=[0]) == 4  # a row that gains much
    assert tree.sizes == {4: (1, 4)}
    assert tree.largest == 4
    for _ in range(60):
        tree.observe(4, {0: 1, 1: 4}, hits=[0, 1])
    assert tree.accuracy_of(0, hit=True) < 0.5 < 1 < tree.accuracy_of(1, hit=True)
    assert tree.accuracy_of(0, hit=False) == FIRST_ACCURACY
    assert tree.size([0], hits=[0]) == 1
    assert tree.size([1], hits=[1]) == 4
    tree.begin(0)
    assert tree.accuracy_of(0, hit=True) == tree.accuracy(hit=True)


def test_an_outlook_changes_no_decision() -> None:
    """Rows get room before a step's size is final. Asking for the outlook must not start a tree that isn't used."""
    told = Acceptance("calibrated", (1.0, 0.02, 0.01, 0.0), (1.0, 0.9, 0.85, 0.8), 0.25)
    tree = choice(1.0, 1.01, 1.3, acceptance=told)
    assert tree.outlook([0, 1]) == 4
    assert tree.size([0, 1]) == 1  # gains 1 %, too little to begin
    assert tree.outlook(range(5)) == 1


def test_an_older_bundle_has_one_estimate_for_both_kinds_of_steps() -> None:
    tree = choice(1.0, 1.3, 1.9)
    assert tree.size([0], hits=[0]) == tree.size([0]) == 2
    assert ACCEPTANCE.expected_tokens(4) == 2.0

"""Lookup: it finds the longest match, its tokens go to the front of a tree, and it changes no answer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.training.calibrate import below_heads, lookup_tokens, step_starts, with_hits
from medusa_export.training.conversations import Sample
from medusa_export.trees.calibration import Calibration
from medusa_export.trees.search import search_tree
from medusa_runtime import Bundle, MedusaEngine, MedusaService, RequestError, SamplingParams, Tree, TreeError
from medusa_runtime.decoding.lookup import TokenLookup
from medusa_runtime.handle import RequestHandle
from medusa_runtime.tuning import LONGEST_MATCH, PLACES, SHORTEST_MATCH
from support.decoding import TREE, greedy
from support.tiny_models import tiny_model
from support.trees import rank_paths

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]


def found_by_brute_force(tokens: list[int], count: int) -> list[int]:
    """The tokens that follow the longest match among the last places, the latest of equals."""
    end = len(tokens)
    matches = []
    for place in range(end - 1, 0, -1):  # tokens[:place] ends like the text
        length = 0
        while length < min(place, LONGEST_MATCH) and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        if length >= SHORTEST_MATCH:
            matches.append((length, place))
    if not matches:
        return []
    place = max(matches[:PLACES])[1]
    following = tokens[place:]
    return (following * count)[:count]


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40), st.integers(1, 5))
def test_the_longest_match_is_followed(tokens: list[int], cut: int, count: int) -> None:
    """The pieces in which the text arrives make no difference."""
    lookup = TokenLookup(tokens[:cut])
    lookup.extend(tokens[cut:])
    assert lookup.find(count) == found_by_brute_force(tokens, count)
    assert lookup.find(0) == []


def test_what_is_found() -> None:
    assert TokenLookup().find(3) == []
    assert TokenLookup([1, 2, 3, 4]).find(3) == []
    assert TokenLookup([1, 2, 3, 4, 9, 1, 2]).find(3) == [3, 4, 9]
    # The latest place has one token more in common.
    assert TokenLookup([7, 1, 2, 3, 8, 1, 2, 4, 8, 1, 2]).find(1) == [4]
    # A text that repeats itself.
    assert TokenLookup([5, 6, 5, 6]).find(5) == [5, 6, 5, 6, 5]


@given(rank_paths(), st.data())
def test_lookup_hits_go_in_front(paths: list[tuple[int, ...]], data: st.DataObject) -> None:
    tree = Tree.from_paths(paths)
    size = data.draw(st.integers(1, tree.size))
    before = np.array(data.draw(st.permutations(range(100, 100 + tree.size))), np.int64)
    hit = data.draw(st.lists(st.integers(98, 104), max_size=4))
    after = before.copy()
    tree.insert(hit, after, size)
    assert after[0] == before[0]
    np.testing.assert_array_equal(after[size:], before[size:])
    node = 0
    for proposed in hit:
        children = [child for child in range(1, size) if tree.parents[child] == node]
        children.sort(key=lambda child: int(tree.ranks[child]))
        if not children or (node and children[0] not in {group[0] for group in tree.best_path_siblings}):
            break
        # The lookup's token, then the heads' candidates in their order.
        others = [token for token in before[children].tolist() if token != proposed]
        assert after[children].tolist() == [proposed, *others][: len(children)]
        best = [child for child in range(1, tree.size) if tree.parents[child] == node]
        node = min(best, key=lambda child: int(tree.ranks[child]))
        if node >= size:
            break


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> Iterator[MedusaEngine]:
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        yield engine


def look_up_in(monkeypatch: pytest.MonkeyPatch, texts: list[list[int]]) -> None:
    """Makes every lookup propose the tokens that follow in one of these texts."""

    def find(self: TokenLookup, count: int) -> list[int]:
        known = self._tokens
        return next((text[len(known) :][:count] for text in texts if text[: len(known)] == known), [])

    monkeypatch.setattr(TokenLookup, "find", find)


@pytest.mark.parametrize("size", [2, 4, 9])
def test_right_hits_fill_steps_and_wrong_ones_change_no_answer(
    engine: MedusaEngine, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(tiny_model("llama"), PROMPT, 80)
    assert list(engine.generate(PROMPT, max_new_tokens=80, tree_size=size).token_ids) == expected
    monkeypatch.setattr(TokenLookup, "find", lambda self, count: [len(self._tokens)] * count)
    assert list(engine.generate(PROMPT, max_new_tokens=80, tree_size=size).token_ids) == expected
    look_up_in(monkeypatch, [PROMPT + expected])
    result = engine.generate(PROMPT, max_new_tokens=80, tree_size=size)
    assert list(result.token_ids) == expected
    deep = sum(group[0] < size for group in TREE.best_path_siblings)
    assert result.stats.steps == -(-79 // (1 + deep))


def test_drawn_tokens_stay_the_same(engine: MedusaEngine) -> None:
    params = SamplingParams(temperature=0.2, seed=3)
    answers = [
        engine.generate(PROMPT, max_new_tokens=60, tree_size=9, sampling=params, lookup=lookup)
        for lookup in (True, False)
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_typical_acceptance_uses_no_lookup(engine: MedusaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typical acceptance takes likely tokens, so with lookup the text would repeat itself."""
    monkeypatch.setattr(TokenLookup, "find", lambda self, count: pytest.fail("it looks up"))
    typical = SamplingParams(temperature=0.5, seed=1, acceptance="typical")
    assert engine.generate(PROMPT, max_new_tokens=20, tree_size=9, sampling=typical)
    assert engine.generate(PROMPT, max_new_tokens=20, tree_size=1)
    assert engine.generate(PROMPT, max_new_tokens=20, tree_size=9, lookup=False)


def test_a_service_looks_up_for_each_row(
    tiny_bundle: Bundle, engine: MedusaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [PROMPT, [5, 9] * 4, [3] * 6, [(11 * i + 2) % 97 for i in range(20)]]
    expected = [greedy(tiny_model("llama"), prompt, 61) for prompt in prompts]
    with MedusaService.load(tiny_bundle.folder, rows=3, threads=1, tree_size=9) as service:

        def answers(*, lookup: bool) -> list[RequestHandle]:
            handles = [service.submit(prompt, max_new_tokens=61, lookup=lookup) for prompt in prompts]
            for tokens, handle in zip(expected, handles, strict=True):
                assert list(handle.result(60).token_ids) == tokens
            return handles

        answers(lookup=True)
        look_up_in(monkeypatch, [[*prompt, *tokens] for prompt, tokens in zip(prompts, expected, strict=True)])
        full = 1 + len(TREE.best_path_siblings)
        assert [handle.stats.steps for handle in answers(lookup=True)] == [-(-60 // full)] * len(prompts)
        assert all(handle.stats.steps > 40 for handle in answers(lookup=False))


def test_a_wrong_value_is_refused(engine: MedusaEngine) -> None:
    with pytest.raises(RequestError, match="lookup is 'yes'"):
        engine.generate(PROMPT, max_new_tokens=2, lookup="yes")


def test_hits_at_each_position_of_a_sample() -> None:
    """At each position the runtime knows the base model's next token, and no later one."""
    ids = [1, 2, 3, 4, 1, 2, 3, 4, 1]
    sample = Sample(ids, [False] * 4 + [True] * 5)
    # The positions 3 to 6 draft after the tokens 1, 2, 3 and 4 of the answer.
    assert lookup_tokens([sample], 2).tolist() == [[-1, -1], [3, 4], [4, 1], [1, 2]]
    assert torch.equal(lookup_tokens([], 2), torch.zeros(0, 2, dtype=torch.int32))


def test_ranks_of_targets_behind_hits() -> None:
    """A lookup hit moves the heads' candidates back, in a tree that holds them all."""
    targets = np.array([[5, 6], [5, 6], [5, 6], [5, 6], [5, -1]])
    places = np.array([[2, 1], [0, 0], [3, 1], [10, 0], [1, -1]])
    hits = np.array([[5, 6], [8, 6], [8, 6], [-1, -1], [5, 7]])
    ranks = np.array([[2, 1], [10, 0], [1, 1], [10, 10], [1, 3]])
    assert with_hits(places, ranks, hits, targets).tolist() == [
        [0, 0],  # both right
        [1, 0],  # a wrong token that no head proposes moves the target back; deeper targets stay
        [3, 1],  # a wrong token that is ahead of the target anyway changes nothing
        [10, 0],
        [0, -1],
    ]


@given(st.lists(st.lists(st.integers(-1, 3), min_size=3, max_size=3), min_size=1, max_size=30), st.data())
def test_steps_begin_where_the_last_one_ended(rows: list[list[int]], data: st.DataObject) -> None:
    places = np.array(rows)
    left = np.zeros(len(rows), np.int64)
    for place in range(len(rows) - 2, -1, -1):
        left[place] = left[place + 1] + 1 if data.draw(st.booleans()) else 0
    starts = step_starts(places, left).tolist()
    assert starts[0] == 0
    for first, second in zip(starts, [*starts[1:], len(rows)], strict=True):
        right = next((depth for depth, rank in enumerate(rows[first]) if rank != 0), 3)
        assert second - first == 1 + min(right, left[first])


def test_paths_are_counted_where_steps_begin() -> None:
    places = np.array([[0, 0], [0, 1], [2, 0], [1, 0]])
    calibration = Calibration.count(places, 4, steps=places[[0, 3]])
    assert calibration.accuracies[0] == (0.5, 0.25, 0.25, 0)
    assert calibration.paths == {(0,): 0.5, (0, 0): 0.5, (1,): 0.5, (1, 0): 0.5}
    assert not calibration.hit_paths


def test_steps_with_a_hit_are_counted_apart_and_go_deeper_than_heads() -> None:
    heads = np.array([[1, 0], [0, 0], [0, 1], [10, -1]])
    targets = np.array([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, -1, -1]])
    steps = below_heads(heads, targets)
    assert steps.tolist() == [[1, 0, 10], [0, 0, 10], [0, 1, 10], [10, -1, -1]]
    steps[1, 2] = 0  # a lookup hit
    calibration = Calibration.count(heads, 10, steps=steps, hits=np.array([False, True, True, False]))
    assert calibration.hit_share == 0.5
    assert calibration.paths == {(1,): 0.5, (1, 0): 1.0}
    assert calibration.hit_paths == {(0,): 1.0, (0, 0): 0.5, (0, 0, 0): 0.5, (0, 1): 0.5}
    assert calibration.max_depth == 3
    assert calibration.value((0, 0, 0)) == 0.25
    tree = search_tree(calibration, 9)
    assert tree.paths == ((1,), (1, 0), (0,), (0, 0), (0, 1), (0, 0, 0))
    acceptance = calibration.acceptance(tree)
    assert acceptance.node_values == (1, 0.5, 1.0, 0, 0, 0, 0)
    assert acceptance.hit_values == (1, 0, 0, 1, 0.5, 0.5, 0.5)
    assert acceptance.expected_tokens(7) == 1 + (1.5 + 2.5) / 2


def test_the_search_begins_with_steps_without_a_hit() -> None:
    """Below the heads it goes on along the path of best candidates, for lookup hits."""
    chain = {(0,) * depth: 0.95**depth for depth in range(1, 7)}
    heads = {(0,): 0.4, (1,): 0.2, (2,): 0.1, (0, 0): 0.15, (0, 1): 0.02}
    calibration = Calibration(((0.4, 0.2, 0.1), (0.3, 0.1, 0.05)), heads, chain, 0.25)
    tree = search_tree(calibration, 9)
    assert tree.paths[:3] == ((0,), (1,), (0, 0))
    assert tree.paths[3:] == ((0,) * 3, (0,) * 4, (0,) * 5, (0,) * 6, (2,))
    assert Tree.from_paths(tree.paths, max_depth=2) == tree
    with pytest.raises(TreeError, match="only the path of best candidates"):
        Tree.from_paths([*tree.paths, (0, 0, 1)], max_depth=2)

"""Acceptance, against brute force."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medusa_export.step.acceptance.exact import ExactRule
from medusa_export.step.acceptance.path import deepest_confirmed
from medusa_export.step.acceptance.rule import VerifiedNodes
from medusa_export.step.sampling import sample
from medusa_export.step.step import MedusaStep
from medusa_export.step.tree_tables import TreeTables
from medusa_runtime import SamplingParams, Tree
from medusa_runtime.bundles.contract import RACE_BLOCK
from support.decoding import make_step
from support.distributions import processed, sampling_inputs_of
from support.tiny_models import tiny_model
from support.trees import rank_paths


def brute_force(tree: Tree, nodes: list[int], chosen: list[int]) -> int:
    """The deepest node whose path is what the base model chose; the first of several."""
    best = 0
    for node in range(1, len(nodes)):
        walk, right = node, True
        while walk:
            right &= nodes[walk] == chosen[int(tree.parents[walk])]
            walk = int(tree.parents[walk])
        if right and tree.depths[node] > tree.depths[best]:
            best = node
    return best


@given(rank_paths(), st.data())
@settings(max_examples=200)
def test_exact_acceptance_is_that_of_a_brute_force_search(paths: list[tuple[int, ...]], data: st.DataObject) -> None:
    """Few tokens, so that agreement is frequent; token 0, which fills padded cells, is one of them."""
    tree = Tree.from_paths(paths)
    size = data.draw(st.integers(1, tree.size))
    tokens = st.lists(st.integers(0, 1), min_size=size, max_size=size)
    nodes, chosen = data.draw(tokens), data.draw(tokens)
    tables = TreeTables(tree, tree.max_depth)
    verified = VerifiedNodes(torch.tensor([nodes]), torch.empty(1, size, 0), torch.tensor([chosen]), tables)
    verdict, finite = ExactRule().judge(verified), torch.ones(1, size, dtype=torch.bool)
    assert int(deepest_confirmed(tables, verdict, finite, torch.tensor([False]))) == brute_force(tree, nodes, chosen)
    assert int(deepest_confirmed(tables, verdict, finite, torch.tensor([True]))) == 0


Verified = tuple[Tree, NDArray[np.float32], NDArray[np.int64], SamplingParams, NDArray[np.float64]]


@st.composite
def verified_trees(draw: st.DrawFn) -> Verified:
    vocab_size = draw(st.integers(2, 12))
    paths: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(1, 10))):
        parent = draw(st.sampled_from(paths))
        rank = sum(len(path) == len(parent) + 1 and path[:-1] == parent for path in paths)
        if len(parent) < 4 and rank < vocab_size:
            paths.append((*parent, rank))
    tree = Tree.from_paths([list(path) for path in paths[1:]])
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    logits = (draw(st.sampled_from([0.3, 1.0, 4.0])) * rng.standard_normal((tree.size, vocab_size))).astype(np.float32)
    nodes = np.zeros(tree.size, np.int64)
    for node in range(tree.size):  # siblings are different tokens
        children = np.flatnonzero(tree.parents[1:] == node) + 1
        nodes[children] = rng.permutation(vocab_size)[: len(children)]
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 2])),
        top_p=draw(st.sampled_from([0.8, 1.0])),
        acceptance="typical",
        typical_epsilon=draw(st.sampled_from([0.02, 0.09, 0.3])),
        typical_alpha=draw(st.sampled_from([None, 0.1, 0.9])),
    )
    return tree, logits, nodes, params, rng.standard_exponential(1 + RACE_BLOCK)


@functools.cache
def any_step() -> MedusaStep:
    return make_step(tiny_model("llama", num_hidden_layers=1), None, Tree())


@given(verified_trees())
@settings(max_examples=300)
def test_typical_acceptance_against_brute_force(example: Verified) -> None:
    tree, logits, nodes, params, numbers = example
    step = any_step()
    step.tables = TreeTables(tree, tree.max_depth)
    given = sampling_inputs_of(np.broadcast_to(numbers, (1, tree.size, len(numbers))), params, logits.shape[1])
    batch, tokens = torch.from_numpy(logits)[None], torch.from_numpy(nodes)[None]
    places = torch.from_numpy(tree.depths)[None]
    made = sample(batch, tokens, step.tables.parents, step.tables.ancestors, places, given)
    verified = VerifiedNodes(tokens, batch, made.chosen, step.tables, given, made)
    accepted = step._accept(verified, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([False]))
    best = int(accepted.node)

    alpha = math.sqrt(params.typical_epsilon) if params.typical_alpha is None else params.typical_alpha
    distributions = [processed(torch.from_numpy(row), params).numpy() for row in logits]

    def bar(p: NDArray[np.float64]) -> float:
        seen = p[p > 0]
        return min(params.typical_epsilon, alpha * math.exp((seen * np.log(seen)).sum()))

    def allowed(p: NDArray[np.float64], token: int) -> bool:
        return bool(p[token] > bar(p) or p[token] == p.max())

    for p in distributions:  # too close to call in fp32
        if (np.abs(p / bar(p) - 1) < 1e-4).any():
            return
    scores = {}
    for node in range(tree.size):
        path = [n for n in tree.node_paths[node][: tree.depths[node] + 1] if n]
        steps = [(distributions[tree.parents[n]], int(nodes[n])) for n in path]
        if all(allowed(p, token) for p, token in steps):
            scores[node] = (len(path), sum(math.log(p[token]) for p, token in steps))
    longest = max(scores.values())
    assert accepted.count == longest[0] + 1
    assert scores[best] == pytest.approx(longest, rel=1e-4, abs=1e-4)
    # The next root is drawn from what is allowed.
    assert allowed(distributions[best], int(made.chosen[0, best]))

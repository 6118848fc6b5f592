"""Sampling: what is drawn, from which distribution, and that neither tree nor batch nor graph changes it."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from medusa_export.step import sampling
from medusa_export.step.eager import EagerBackend
from medusa_export.step.sampling import SamplingInputs, sample
from medusa_export.step.step import MedusaStep
from medusa_runtime import Bundle, BundleError, MedusaEngine, RequestError, SamplingParams, Tree
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import DESCRIPTION
from medusa_runtime.bundles.contract import MAX_TOP_K, RACE_BLOCK, num_blocks
from medusa_runtime.sampling import GREEDY, Draws, SamplingRows
from support.decoding import export, greedy, guessing_heads, make_step
from support.stock import Stock
from support.tiny_models import tiny_model

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]
FALSE_ALARM = 1e-6  # of each test of a distribution, whose seeds are fixed besides


def inputs(exponentials: NDArray[np.floating], params: SamplingParams) -> SamplingInputs:
    """A batch of rows that draw alike, with numbers of their own."""
    rows = len(exponentials)
    made = SamplingRows(rows)
    for row in range(rows):
        made.assign(row, Draws(params, 0, 1))
    given = {name: torch.from_numpy(array) for name, array in made.inputs.items()}
    return SamplingInputs(exponentials=torch.from_numpy(exponentials.astype(np.float32)), **given)


def draw(logits: torch.Tensor, exponentials: NDArray[np.floating], params: SamplingParams) -> NDArray[np.int64]:
    """Draws from one distribution [V] with the numbers of each row, [N, blocks + 256]."""
    rows = len(exponentials)
    none = torch.zeros(rows, 1, dtype=torch.int64)
    given = inputs(exponentials[:, None], params)
    return sample(logits.expand(rows, 1, -1), none, none[0], none, given).chosen[:, 0].numpy()


def many(logits: torch.Tensor, params: SamplingParams, count: int) -> NDArray[np.int64]:
    """So many draws from one distribution."""
    seeded = replace(params, seed=len(logits))
    return draw(logits, Draws(seeded, 0, len(logits)).numbers(0, count), params)


def with_a_chance(logits: torch.Tensor, params: SamplingParams) -> NDArray[np.int64]:
    """The tokens that can be drawn at all: each gets numbers that let it win wherever it has a weight."""
    vocab_size = len(logits)
    blocks = num_blocks(vocab_size)
    exponentials = np.ones((vocab_size, blocks + RACE_BLOCK), np.float32)
    token = np.arange(vocab_size)
    exponentials[token, token // RACE_BLOCK] = exponentials[token, blocks + token % RACE_BLOCK] = 1e-30
    return np.flatnonzero(draw(logits, exponentials, params) == token)


def log_probabilities(logits: torch.Tensor, params: SamplingParams) -> NDArray[np.float32]:
    """Of all tokens [V], as the step has them: what typical acceptance scores a node by, where it refuses none."""
    vocab_size = len(logits)
    allowing = replace(params, acceptance="typical", typical_epsilon=1e-30)
    numbers = np.ones((1, vocab_size, num_blocks(vocab_size) + RACE_BLOCK))
    nodes, zero = torch.arange(vocab_size)[None], torch.zeros(vocab_size, dtype=torch.int64)
    made = sample(logits.expand(1, vocab_size, -1), nodes, zero, zero[None], inputs(numbers, allowing))
    return made.support[0].numpy()


def processed(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution [V] that transformers would sample from."""
    scores = TemperatureLogitsWarper(params.temperature)(None, logits.float()[None])
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return scores[0].double().softmax(-1)


@pytest.mark.parametrize("vocab_size", [5, 256, 700])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=2.5),
        SamplingParams(top_k=3),
        SamplingParams(top_k=1),
        SamplingParams(top_p=0.3),
        SamplingParams(top_p=0.97),
        SamplingParams(top_p=0.9999),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
@pytest.mark.parametrize("sharpness", [0.1, 3.0])
def test_the_distribution_is_that_of_transformers(vocab_size: int, params: SamplingParams, sharpness: float) -> None:
    logits = sharpness * torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    expected = processed(logits, params).numpy()
    np.testing.assert_array_equal(with_a_chance(logits, params), np.flatnonzero(expected))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(log_probabilities(logits, params), np.log(expected), atol=1e-4)
    groups = Counter((token % 50,) for token in many(logits, params, 3_000).tolist())
    assert p_value(groups, {(group,): expected[group::50].sum() for group in range(50)}) > FALSE_ALARM


def test_a_nucleus_may_be_larger_than_what_is_sorted() -> None:
    logits = 0.01 * torch.randn(1500, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(top_p=0.5)
    nucleus = np.flatnonzero(processed(logits, params).numpy())
    assert len(nucleus) > 2 * MAX_TOP_K
    np.testing.assert_array_equal(with_a_chance(logits, params), nucleus)


def test_equal_logits_stay_or_go_together() -> None:
    logits = torch.tensor([0.0, 1.0, 0.0, 1.0, -1.0])
    assert with_a_chance(logits, SamplingParams(top_k=1)).tolist() == [1, 3]
    assert with_a_chance(logits, SamplingParams(top_p=0.8)).tolist() == [0, 1, 2, 3]


def test_what_has_no_chance_is_never_drawn() -> None:
    """Blocks that are all but empty, tokens that fill up the last one, and the ends of what numbers may be."""
    logits = torch.full((700,), -torch.inf)
    logits[[5, 300, 301]] = torch.tensor([0.0, -20.0, 3.0])
    assert with_a_chance(logits, SamplingParams()).tolist() == [5, 300, 301]
    assert with_a_chance(logits, SamplingParams(top_p=0.5)).tolist() == [301]
    unlikely = np.full((1, 3 + RACE_BLOCK), 1e-30)
    unlikely[:, [1, 3 + 301 - 256]] = 100.0  # against the only block and the only token that is left
    assert draw(logits, unlikely, SamplingParams(top_p=0.5)).tolist() == [301]


def test_rounding_changes_few_draws() -> None:
    """Logits that are off by a thousandth, a flat distribution of many tokens: nearly all draws are the same."""
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    noise = 1e-3 * torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=1.5)
    assert (many(logits, params, 400) == many(logits + noise, params, 400)).mean() > 0.99


def test_a_mutation_of_the_draw_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_below_the_best(scaled: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        like = scaled[..., :1]
        return torch.full_like(like, -1.0), torch.zeros_like(like, dtype=torch.bool), torch.zeros_like(like)

    monkeypatch.setattr(sampling, "_least_logit", one_below_the_best)
    with pytest.raises(AssertionError):
        test_the_distribution_is_that_of_transformers(101, SamplingParams(), 3.0)


def test_a_biased_race_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token keeps its chance and its log probability: only how often each wins tells."""
    monkeypatch.setattr(sampling, "_by_race", lambda e, blocks: (e[..., :blocks], e[..., blocks:] ** 1.2))
    with pytest.raises(AssertionError):
        test_the_distribution_is_that_of_transformers(101, SamplingParams(), 3.0)


def test_numbers_hang_on_the_seed_and_the_place() -> None:
    draws = Draws(SamplingParams(seed=7), 10, 1000)
    whole = draws.numbers(10, 100)
    assert whole.shape == (100, 4 + RACE_BLOCK) and (whole > 0).all()
    assert len(np.unique(whole)) > 0.99 * whole.size
    for place, count in ((10, 1), (25, 2), (26, 70), (109, 1), (40, 3)):  # also back, beyond what is kept
        np.testing.assert_array_equal(draws.numbers(place, count), whole[place - 10 :][:count])
    moved = Draws(SamplingParams(seed=7), 500, 1000)
    np.testing.assert_array_equal(moved.numbers(500, 20), whole[:20])
    assert not np.array_equal(Draws(SamplingParams(seed=8), 10, 1000).numbers(10, 1), whole[:1])
    assert abs(whole.mean() - 1) < 0.02


# Whole decoding: the joint distribution of what is emitted.

SMALL = 7  # tokens


@pytest.fixture(scope="module")
def small_bundle(stock: Stock) -> Bundle:
    """A model of few tokens, none of which it is sure of, with heads that guess them well enough."""
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=SMALL)
    model.lm_head.weight.data *= 0.5
    tree = Tree.from_paths([[0], [1], [0, 0], [2], [0, 1], [1, 0], [0, 0, 0]])
    step = make_step(model, guessing_heads(model), tree)
    return Bundle.load(stock.folder("seven-tokens", lambda folder: export(step, folder)))


def joint_distribution(bundle: Bundle, prompt: list[int], length: int, params: SamplingParams) -> dict[tuple, float]:
    """Of the next ``length`` tokens, by teacher-forced log probabilities of plain steps."""
    backend = OnnxRuntimeBackend(bundle, threads=1)
    backend.reserve(64)
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=SMALL)
    model.lm_head.weight.data *= 0.5
    table = {}
    for tokens in itertools.product(range(SMALL), repeat=length):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        chances = [processed(row, params)[token].item() for row, token in zip(logits, tokens, strict=True)]
        table[tokens] = math.prod(chances)
    return table


def p_value(counts: Counter[tuple], expected: dict[tuple, float]) -> float:
    """Of a chi-square test; cells that are too rare for it are put together."""
    total = counts.total()
    assert set(counts) <= {cell for cell, chance in expected.items() if chance > 0}
    large = [cell for cell, chance in expected.items() if chance * total >= 10]
    rest = 1 - sum(expected[cell] for cell in large)
    pairs = [(counts[cell], expected[cell] * total) for cell in large]
    if rest * total >= 10:
        pairs.append((total - sum(counts[cell] for cell in large), rest * total))
    if len(pairs) == 1:
        return 1.0  # there was no choice
    statistic = sum((got - wanted) ** 2 / wanted for got, wanted in pairs)
    halves = torch.tensor([len(pairs) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*halves))


def sampled(backend: Backend, tree: Tree, size: int, length: int, params: SamplingParams, times: int) -> Counter[tuple]:
    """What ``times`` requests with seeds of their own emit first, 8 rows at a time."""
    counts: Counter[tuple] = Counter()
    accepted = 0
    for first in range(0, times, backend.rows):
        rows = range(backend.rows)
        for row in rows:
            backend.reset(row)
            seeded = SamplingParams(**{**vars(params), "seed": first + row})
            backend.assign(row, Draws(seeded, len(PROMPT) % SMALL + 2, SMALL))
        prompt = [token % SMALL for token in PROMPT][: len(PROMPT) % SMALL + 2]
        result = backend.step(max(len(prompt), tree.size), dict.fromkeys(rows, prompt))
        emitted = [[int(result.tokens[row, 0])] for row in rows]
        while min(map(len, emitted)) < length:
            result = backend.step(size)
            accepted += int(result.count.sum()) - len(rows)
            for row in rows:
                emitted[row] += result.tokens[row, : result.count[row]].tolist()
        counts.update(tuple(tokens[:length]) for tokens in emitted)
    assert size == 1 or accepted > times / 10, "no draft was ever accepted: that shows nothing"
    return counts


@pytest.mark.parametrize("size", [1, 8, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.7, top_k=6, top_p=0.95)], ids=["plain", "cut off"]
)
def test_emitted_tokens_have_the_joint_distribution_of_the_model(
    small_bundle: Bundle, size: int, params: SamplingParams
) -> None:
    backend = OnnxRuntimeBackend(small_bundle, rows=8, threads=1)
    backend.reserve(64)
    prompt = [token % SMALL for token in PROMPT][: len(PROMPT) % SMALL + 2]
    counts = sampled(backend, small_bundle.tree, size, 3, params, times=4000)
    assert p_value(counts, joint_distribution(small_bundle, prompt, 3, params)) > FALSE_ALARM


def test_a_bias_towards_drafts_is_seen(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting what typical acceptance allows is no exact sampling: the test above must see that."""
    backend = OnnxRuntimeBackend(small_bundle, rows=8, threads=1)
    backend.reserve(64)
    prompt = [token % SMALL for token in PROMPT][: len(PROMPT) % SMALL + 2]
    typical = SamplingParams(acceptance="typical", typical_epsilon=0.01)
    counts = sampled(backend, small_bundle.tree, 8, 3, typical, times=4000)
    assert p_value(counts, joint_distribution(small_bundle, prompt, 3, SamplingParams())) < FALSE_ALARM


# Acceptance, against brute force.


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
        children = tree.children(node) if hasattr(tree, "children") else np.flatnonzero(tree.parents[1:] == node) + 1
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
@settings(max_examples=300, deadline=None)
def test_typical_acceptance_against_brute_force(example: Verified) -> None:
    tree, logits, nodes, params, numbers = example
    step = any_step()
    step._add_tables(tree)
    given = inputs(np.broadcast_to(numbers, (1, tree.size, len(numbers))), params)
    batch, tokens = torch.from_numpy(logits)[None], torch.from_numpy(nodes)[None]
    places = torch.from_numpy(tree.depths)[None]
    made = sample(batch, tokens, torch.from_numpy(tree.parents), places, given)
    best, count = step._accept(
        tokens, made.chosen, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([False]), made
    )

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
    assert count == longest[0] + 1
    assert scores[int(best)] == pytest.approx(longest, rel=1e-4, abs=1e-4)
    # The next root is drawn from what is allowed.
    assert allowed(distributions[int(best)], int(made.chosen[0, best]))


# The same text, whatever the tree, the batch, the chunks and the graph.

POLICIES = [
    SamplingParams(seed=3),
    SamplingParams(seed=4, temperature=0.7, top_k=20, top_p=0.9),
    SamplingParams(seed=5, temperature=1.5, min_p=0.02),
    GREEDY,
]


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> MedusaEngine:
    return MedusaEngine.load(tiny_bundle.folder, threads=1)


@pytest.mark.parametrize("params", POLICIES, ids=str)
def test_exact_sampling_gives_the_same_with_every_tree(engine: MedusaEngine, params: SamplingParams) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=40, tree_size=1, sampling=params, logprobs=True)
    for size in range(2, 10):
        for chunk in (5, 512):
            result = engine.generate(
                PROMPT, max_new_tokens=40, tree_size=size, prefill_chunk=chunk, sampling=params, logprobs=True
            )
            assert result.token_ids == expected.token_ids
            assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_temperature_zero_is_greedy(engine: MedusaEngine) -> None:
    expected = tuple(greedy(tiny_model("llama"), PROMPT, 40))
    for params in (None, GREEDY, SamplingParams(temperature=0.0, top_k=7, top_p=0.2, acceptance="typical")):
        assert engine.generate(PROMPT, max_new_tokens=40, sampling=params).token_ids == expected
    cold = SamplingParams(temperature=1e-3, seed=1)
    assert engine.generate(PROMPT, max_new_tokens=40, sampling=cold).token_ids == expected


def test_seeds(engine: MedusaEngine) -> None:
    def tokens(seed: int | None, **more: object) -> tuple[int, ...]:
        params = SamplingParams(seed=seed, **more)
        return engine.generate(PROMPT, max_new_tokens=30, tree_size=9, sampling=params).token_ids

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)
    assert tokens(7, acceptance="typical") == tokens(7, acceptance="typical")


def test_log_probabilities_are_those_of_the_model(engine: MedusaEngine) -> None:
    model = tiny_model("llama")
    for params in (
        None,
        SamplingParams(seed=2, temperature=0.5, top_k=9),
        SamplingParams(seed=2, acceptance="typical"),
    ):
        result = engine.generate(PROMPT, max_new_tokens=20, tree_size=9, sampling=params, logprobs=True)
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *result.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(20), torch.tensor(result.token_ids)]
        assert result.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert engine.generate(PROMPT, max_new_tokens=5).logprobs is None
    streamed = [p for chunk in engine.stream(PROMPT, max_new_tokens=20, logprobs=True) for p in chunk.logprobs]
    assert len(streamed) == 20


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_graphs_sample_as_the_eager_step_does(stock: Stock, derived: bool, rows: int) -> None:
    """Rows of different policies side by side, sizes and widths changing from step to step."""
    exported = stock.export("qwen2", num_hidden_layers=2, vocab_size=601)
    step, bundle = exported.step, exported.bundle
    compiled = OnnxRuntimeBackend(bundle, rows=rows, threads=1, graph=None if derived else bundle.graph)
    eager = EagerBackend(step, rows=rows)
    policies = [
        SamplingParams(seed=1, temperature=2.0, acceptance="typical", typical_epsilon=0.01),
        SamplingParams(seed=2, temperature=8.0, top_p=0.95),  # of a flat distribution: beyond what is sorted
        None,
    ]
    for backend in (compiled, eager):
        backend.reserve(128)
        for row in range(rows):
            params = policies[row]
            backend.assign(row, None if params is None else Draws(params, len(PROMPT), 601))
        backend.step(13, dict.fromkeys(range(rows), PROMPT))
    longest = 0
    for size in (9, 1, 4, 2, 9, 9, 6, 1, 9):
        got, wanted = compiled.step(size), eager.step(size)
        np.testing.assert_array_equal(got.count, wanted.count)
        for row in range(rows):
            tokens, logprobs = got.emitted(row)
            assert tokens == wanted.emitted(row)[0]
            if policies[row] is not None:
                assert logprobs == pytest.approx(wanted.emitted(row)[1], abs=1e-4)
        np.testing.assert_array_equal(compiled.drafts[:, :size], eager.drafts[:, :size])
        longest = max(longest, int(got.count[0]))
    assert longest > 1
    assert rows == 1 or eager.output.sampled.beyond.any()


def test_greedy_only_leaves_sampling_out(stock: Stock) -> None:
    expected = tuple(greedy(tiny_model("llama"), PROMPT, 20))
    bundle = stock.export(sampling=False).bundle
    assert not bundle.sampling
    assert {spec.name for spec in bundle.inputs}.isdisjoint({"exponentials", "temperature"})
    with MedusaEngine.load(bundle.folder, threads=1) as engine:
        assert engine.generate(PROMPT, max_new_tokens=20).token_ids == expected
        assert engine.generate(PROMPT, max_new_tokens=20, sampling=GREEDY).token_ids == expected
        with pytest.raises(RequestError, match="export it without --greedy-only"):
            engine.generate(PROMPT, sampling=SamplingParams())
        with pytest.raises(RequestError, match="can't give log probabilities"):
            engine.generate(PROMPT, logprobs=True)


def test_bundles_of_older_contracts(stock: Stock, tmp_path: Path) -> None:
    """Greedy ones are what they were; others had another input to draw with."""
    for samples, name in ((False, "greedy"), (True, "sampling")):
        folder = Path(shutil.copytree(stock.export(sampling=samples).bundle.folder, tmp_path / name))
        path = folder / DESCRIPTION
        data = json.loads(path.read_text()) | {"contract_version": 2}
        for spec in data["inputs"]:
            if spec["name"] == "exponentials":
                spec |= {"name": "uniforms", "shape": ["batch", "draws"]}
        path.write_text(json.dumps(data))
    assert not Bundle.load(tmp_path / "greedy").sampling
    with pytest.raises(BundleError, match="Export the bundle again"):
        Bundle.load(tmp_path / "sampling")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("temperature", 10**400), ("temperature", 1e-50), ("typical_alpha", 10**400),
        ("top_k", -1), ("top_k", 1.5), ("top_k", MAX_TOP_K + 1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1),
        ("seed", -1), ("seed", 1.0), ("typical_epsilon", 0.0), ("typical_alpha", 0.0), ("acceptance", "greedy"),
    ],
)  # fmt: skip
def test_parameters_that_make_no_sense(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} is .*: expected"):
        SamplingParams(**{name: value})


def test_what_a_request_may_not_ask_for(engine: MedusaEngine) -> None:
    with pytest.raises(RequestError, match="give SamplingParams"):
        engine.generate(PROMPT, sampling={"temperature": 1.0})
    with pytest.raises(RequestError, match="expected True or False"):
        engine.generate(PROMPT, logprobs=5)

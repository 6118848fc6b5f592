"""Sampled decoding: the joint distribution of what is emitted, and that tree, batch and graph don't change it."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from medusa_export.step.eager import EagerBackend
from medusa_runtime import Bundle, MedusaEngine, SamplingParams, Tree
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.sampling import GREEDY, Draws
from support.decoding import export, greedy, make_step, random_heads
from support.distributions import FALSE_ALARM, p_value, processed
from support.stock import Stock
from support.tiny_models import tiny_model

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]
SMALL = 7  # tokens
ROWS = 100  # a step of 100 rows takes hardly longer than one of 8


@pytest.fixture(scope="module")
def small_bundle(stock: Stock) -> Bundle:
    """A model of few tokens, none of which it is sure of, with heads whose drafts are often right."""
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=SMALL)
    model.lm_head.weight.data *= 0.5
    tree = Tree.from_paths([[0], [1], [0, 0], [2], [0, 1], [1, 0], [0, 0, 0]])
    step = make_step(model, random_heads(model), tree)
    return Bundle.load(stock.folder("seven-tokens", lambda folder: export(step, folder)))


def joint_distribution(bundle: Bundle, prompt: list[int], length: int, params: SamplingParams) -> dict[tuple, float]:
    """Of the next ``length`` tokens, by teacher-forced log probabilities of plain steps."""
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=SMALL)
    model.lm_head.weight.data *= 0.5
    table = {}
    texts = list(itertools.product(range(SMALL), repeat=length))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens] for tokens in texts])).logits[:, len(prompt) - 1 : -1]
    for tokens, rows in zip(texts, logits, strict=True):
        chances = [processed(row, params)[token].item() for row, token in zip(rows, tokens, strict=True)]
        table[tokens] = math.prod(chances)
    return table


def sampled(backend: Backend, tree: Tree, size: int, length: int, params: SamplingParams, times: int) -> Counter[tuple]:
    """The first tokens of ``times`` requests with seeds of their own, as many at a time as there are rows."""
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


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 8, 4])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.7, top_k=6, top_p=0.95)], ids=["plain", "cut off"]
)
def test_emitted_tokens_have_the_joint_distribution_of_the_model(
    small_bundle: Bundle, size: int, params: SamplingParams
) -> None:
    backend = OnnxRuntimeBackend(small_bundle, rows=ROWS, threads=1)
    backend.reserve(64)
    prompt = [token % SMALL for token in PROMPT][: len(PROMPT) % SMALL + 2]
    counts = sampled(backend, small_bundle.tree, size, 3, params, times=4000)
    assert p_value(counts, joint_distribution(small_bundle, prompt, 3, params)) > FALSE_ALARM


@pytest.mark.slow
def test_a_bias_towards_drafts_is_seen(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting what typical acceptance allows is no exact sampling: the test above must see that."""
    backend = OnnxRuntimeBackend(small_bundle, rows=ROWS, threads=1)
    backend.reserve(64)
    prompt = [token % SMALL for token in PROMPT][: len(PROMPT) % SMALL + 2]
    typical = SamplingParams(acceptance="typical", typical_epsilon=0.01)
    counts = sampled(backend, small_bundle.tree, 8, 3, typical, times=4000)
    assert p_value(counts, joint_distribution(small_bundle, prompt, 3, SamplingParams())) < FALSE_ALARM


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


@pytest.mark.slow
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
            tokens, logprobs, _ = got.emitted(row)
            assert tokens == wanted.emitted(row)[0]
            if policies[row] is not None:
                assert logprobs == pytest.approx(wanted.emitted(row)[1], abs=1e-4)
        np.testing.assert_array_equal(compiled.drafts[:, :size], eager.drafts[:, :size])
        longest = max(longest, int(got.count[0]))
    assert longest > 1
    assert rows == 1 or eager.output.sampled.beyond.any()


@pytest.mark.slow
def test_the_most_likely_tokens_of_a_small_vocabulary_are_all_its_tokens(small_bundle: Bundle) -> None:
    prompt = [token % SMALL for token in PROMPT]
    with MedusaEngine.load(small_bundle.folder, threads=1) as engine:
        result = engine.generate(prompt, max_new_tokens=9, logprobs=True, top_logprobs=20)
    assert result.top_logprobs is not None
    for place in result.top_logprobs:
        assert sorted(top.token_id for top in place) == list(range(SMALL))
        assert sum(math.exp(top.logprob) for top in place) == pytest.approx(1.0, abs=1e-4)

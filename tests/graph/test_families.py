"""The step on every family of models: eager, and compiled, it decodes what transformers decodes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from medusa_export.step.eager import EagerBackend
from medusa_export.step.step import MedusaStep
from medusa_runtime import Bundle, MedusaEngine, Tree
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import GRAPH, ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_GRAPH
from support.decoding import TREE, decode, greedy
from support.stock import Stock
from support.tiny_models import SEEDS, SUPPORTED_FAMILIES, families, tiny_model

COUNT = 24
PROMPTS = [[(7 * i * i + 3) % 101 for i in range(13)], [(5 * i * i + 11 * i + 1) % 101 for i in range(22)]]
WAYS = [(1, 64), (1, 5), (4, 3), (9, 64), (9, 7)]  # tree size, prefill chunk


@dataclass
class Family:
    step: MedusaStep
    expected: list[list[int]]
    bundle: Bundle


@pytest.fixture(scope="module", params=families("llama", others=SUPPORTED_FAMILIES))
def family(request: pytest.FixtureRequest, stock: Stock) -> Family:
    seed = SEEDS.get(request.param, 0)
    expected = [greedy(tiny_model(request.param, seed), prompt, COUNT) for prompt in PROMPTS]
    exported = stock.family(request.param)
    return Family(exported.step, expected, exported.bundle)


def derived(family: Family, graph: str) -> Path:
    """A graph of the bundle; ``MultiHeadAttention`` has no soft cap, so that some have none for several rows."""
    if graph not in family.bundle.files:
        config = family.step.model.config
        assert graph == ONNXRUNTIME_BATCH_GRAPH and config.attn_logit_softcapping is not None
        pytest.skip("attention with a soft cap")
    return family.bundle.folder / graph


def test_the_reference_is_no_constant(family: Family) -> None:
    for tokens in family.expected:
        assert len(set(tokens)) >= 6


@pytest.mark.parametrize(("size", "chunk"), WAYS)
def test_eager_step_decodes_as_transformers(family: Family, size: int, chunk: int) -> None:
    result = decode(
        EagerBackend(family.step, rows=2), TREE, PROMPTS, family.expected, size=size, chunk=chunk, count=COUNT
    )
    assert result.tokens == family.expected


@pytest.mark.parametrize(("graph", "rows"), [(GRAPH, 2), (ONNXRUNTIME_GRAPH, 1), (ONNXRUNTIME_BATCH_GRAPH, 2)])
def test_compiled_step_decodes_as_transformers(family: Family, graph: str, rows: int) -> None:
    backend = OnnxRuntimeBackend(family.bundle, rows=rows, threads=1, graph=derived(family, graph))
    accepted: Counter[int] = Counter()
    for first in range(0, 2, rows):
        prompts, expected = PROMPTS[first : first + rows], family.expected[first : first + rows]
        for size, chunk in WAYS:
            result = decode(backend, TREE, prompts, expected, size=size, chunk=chunk, count=COUNT, seed=chunk + first)
            assert result.tokens == expected, (size, chunk)
            accepted += result.accepted
    assert set(accepted) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("graph", [GRAPH, ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH])
def test_compiled_step_drafts_as_the_eager_one(family: Family, graph: str) -> None:
    compiled = OnnxRuntimeBackend(family.bundle, threads=1, graph=derived(family, graph))
    eager = EagerBackend(family.step)
    for backend in (compiled, eager):
        backend.reserve(96)
        backend.step(13, {0: PROMPTS[1][:13]})
        backend.step(9, {0: PROMPTS[1][13:]})
    for size in (9, 4, 1, 9, 2):
        steps = [backend.step(size) for backend in (compiled, eager)]
        np.testing.assert_array_equal(steps[0].count, steps[1].count)
        np.testing.assert_array_equal(steps[0].tokens[:, : steps[0].count[0]], steps[1].tokens[:, : steps[0].count[0]])
        np.testing.assert_array_equal(compiled.drafts[:, :size], eager.drafts[:, :size])


def test_logits_are_those_of_the_model(family: Family) -> None:
    eager = EagerBackend(family.step)
    eager.reserve(64)
    eager.step(22, {0: PROMPTS[1]})
    plain = family.step.model
    plain.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            expected = plain(torch.tensor([PROMPTS[1]])).logits[0, -1]
    finally:
        plain.set_attn_implementation("medusa_export")
    torch.testing.assert_close(eager.output.logits[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_graph_is_standard_and_in_place(family: Family) -> None:
    model = onnx.load(family.bundle.graph)
    onnx.checker.check_model(str(family.bundle.graph), full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}
    ops = Counter(node.op_type for node in model.graph.node)
    caches = [value.name for value in model.graph.input if value.name.startswith("past_")]
    assert ops["TensorScatter"] == len(caches)
    assert ops["Attention"] == len(caches) // 2
    readers = {name: [node.op_type for node in model.graph.node if name in node.input] for name in caches}
    assert all(found in (["TensorScatter"], ["Shape", "TensorScatter"]) for found in readers.values()), readers
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["past_key_0"][::2] == ["batch", "capacity"]


def test_the_families_of_the_issue_are_here() -> None:
    named = "llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 olmo2 granite smollm3 starcoder2 gpt_neox"
    assert set(named.split()) <= set(SUPPORTED_FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_answers_to_the_end_of_the_context(stock: Stock, name: str) -> None:
    """Nodes and padding may have positions beyond it, for which GPT-2's table has no row."""
    bundle = stock.export(name, sampling=False, max_position_embeddings=64).bundle
    expected = greedy(tiny_model(name, max_position_embeddings=64), PROMPTS[0], 64 - len(PROMPTS[0]))
    engine = MedusaEngine.load(bundle.folder, threads=1)
    for size, chunk in ((1, 64), (5, 64), (9, 7)):
        result = engine.generate(PROMPTS[0], max_new_tokens=len(expected), tree_size=size, prefill_chunk=chunk)
        assert list(result.token_ids) == expected
    long = [*PROMPTS[0], *expected][:61]
    assert list(engine.generate(long, max_new_tokens=3, tree_size=9).token_ids) == expected[-3:]


@pytest.mark.parametrize("name", families("llama", others=("gpt_neox",)))
def test_a_model_without_heads(stock: Stock, name: str) -> None:
    expected = [greedy(tiny_model(name), prompt, COUNT) for prompt in PROMPTS]
    bundle = stock.export(name, heads=False).bundle
    for rows in (1, 2):
        backend = OnnxRuntimeBackend(bundle, rows=rows, threads=1)
        for chunk in (64, 5):
            result = decode(backend, Tree(), PROMPTS[:rows], expected[:rows], size=1, chunk=chunk, count=COUNT)
            assert result.tokens == expected[:rows]

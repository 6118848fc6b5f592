"""The graph derived for ONNX Runtime's CUDA provider: what it computes, on a CPU, and how it reads the caches."""

from __future__ import annotations

import onnx
import pytest

from medusa_runtime import Bundle
from medusa_runtime.bundles.bundle import GRAPH, ONNXRUNTIME_CUDA_GRAPH
from support.decoding import TREE, decode, greedy
from support.on_host import OnnxRuntimeOnHost
from support.stock import Stock
from support.tiny_models import SEEDS, families, tiny_model

COUNT = 24
PROMPTS = [[(7 * i * i + 3) % 101 for i in range(13)], [(5 * i * i + 11 * i + 1) % 101 for i in range(22)]]
# Heads in groups, in one group, in none; biases per head; soft caps and windows; latent caches; sinks.
FAMILIES = families("llama", others=["falcon", "gpt2", "falcon_alibi", "gemma2", "deepseek_v2", "gpt_oss"])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_decodes_as_transformers(family: str, stock: Stock) -> None:
    bundle = stock.family(family).bundle
    assert ONNXRUNTIME_CUDA_GRAPH in bundle.files
    expected = [greedy(tiny_model(family, SEEDS.get(family, 0)), prompt, COUNT) for prompt in PROMPTS]
    backend = OnnxRuntimeOnHost(bundle, rows=2, threads=1)
    for size, chunk in ((1, 5), (9, 7)):
        result = decode(backend, TREE, PROMPTS, expected, size=size, chunk=chunk, count=COUNT, seed=chunk)
        assert result.tokens == expected, (size, chunk)


def test_query_heads_that_share_a_key_head_are_tokens_of_it(tiny_bundle: Bundle) -> None:
    graph = onnx.load(tiny_bundle.folder / ONNXRUNTIME_CUDA_GRAPH, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attentions) == tiny_bundle.model.num_layers
    shapes = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if not tensor.external_data
    }
    for node in attentions:
        merge = makers[node.input[0]]
        assert merge.op_type == "Reshape"
        assert shapes[merge.input[1]].tolist()[:3] == [0, 2, -1]
    biases = {node.input[3] for node in attentions}
    assert len(biases) == 1  # one for all layers
    assert makers[biases.pop()].op_type == "Concat"


def test_it_has_the_inputs_and_outputs_of_the_standard_graph(tiny_bundle: Bundle) -> None:
    standard, derived = (
        onnx.load(tiny_bundle.folder / name, load_external_data=False).graph for name in (GRAPH, ONNXRUNTIME_CUDA_GRAPH)
    )
    for kind in ("input", "output"):
        names = [[value.name for value in getattr(graph, kind)] for graph in (standard, derived)]
        assert names[0] == names[1]

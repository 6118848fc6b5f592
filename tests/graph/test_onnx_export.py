"""The graph of a step, beyond what ``test_families`` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from medusa_export.common.errors import ExportError
from medusa_export.graph import layer_reuse, layers
from medusa_export.graph import trace as onnx_trace
from medusa_export.graph.export import build_graph
from medusa_export.graph.rewrites.rewrite import StepFacts
from medusa_export.heads.modules import MedusaConfig, MedusaHeads
from medusa_export.step.eager import EagerBackend
from medusa_export.targets.onnxruntime.best_token import SplitArgMax
from medusa_export.targets.onnxruntime.constants import IR_VERSION
from medusa_runtime import BackendError, Bundle, Tree
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import GRAPHS, ONNXRUNTIME_CUDA_GRAPH
from support.decoding import TREE, decode, export, greedy, make_step, random_heads
from support.stock import Stock
from support.tiny_models import SEEDS, tiny_model
from support.tiny_tokenizer import make_tokenizer

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]


@pytest.mark.slow  # each size is an export of its own
@pytest.mark.parametrize("size", [2, 4, 7])
def test_no_size_of_a_tree_is_special(tmp_path: Path, size: int) -> None:
    """A tree of seven nodes once met an example of seven tokens, and both became one constant."""
    tree = TREE.prefix(size)
    model = tiny_model("llama", num_hidden_layers=1)
    expected = [greedy(model, PROMPT, 16)]
    bundle = export(make_step(model, random_heads(model, tree.max_depth), tree), tmp_path / "bundle")
    for graph in (bundle.graph, None):
        backend = OnnxRuntimeBackend(bundle, threads=1, graph=graph)
        for chunk in (size - 1 or 1, size, size + 1, 13):
            result = decode(backend, tree, [PROMPT], expected, size=size, chunk=chunk, count=16)
            assert result.tokens == expected, (graph, chunk)


@pytest.mark.slow  # an export of its own
def test_blocks_of_many_layers_are_gathered_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With up to three inputs per node, six blocks take two nodes and one more."""
    monkeypatch.setattr(layers, "MOST_CONCATENATED", 3)
    model = tiny_model("llama", num_hidden_layers=3)
    expected = [greedy(model, PROMPT, 24)]
    step = make_step(model, random_heads(model))
    step.sampling = False  # such a graph is traced in half the time
    bundle = export(step, tmp_path / "bundle")
    nodes = [node for node in ir.load(bundle.graph).graph if (node.name or "").startswith("concat_blocks")]
    assert [len(node.inputs) for node in nodes] == [3, 3, 2]
    result = decode(
        OnnxRuntimeBackend(bundle, threads=1, graph=bundle.graph), TREE, [PROMPT], expected, size=9, chunk=5, count=24
    )
    assert result.tokens == expected


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["reduced vocabulary", "two blocks", "own projection"])
def test_kinds_of_heads(stock: Stock, variant: str) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    expected = [greedy(model, PROMPT, 16)]
    reduced = variant == "reduced vocabulary"
    config = MedusaConfig(
        num_heads=3,
        num_layers=2 if variant == "two blocks" else 1,
        hidden_size=64,
        draft_vocab_size=40 if reduced else 101,
        shared_lm_head=variant == "two blocks",
        reduced_vocab=reduced,
    )
    heads = MedusaHeads(config, model.get_output_embeddings())
    generator = torch.Generator().manual_seed(1)
    for parameter in heads.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    if reduced:
        heads.token_map = torch.randperm(101, generator=generator)[:40]
    step = make_step(model, heads.eval().requires_grad_(False))
    step.sampling = False
    bundle = Bundle.load(stock.folder(f"heads-{variant}", lambda out: export(step, out)))
    for graph in (bundle.graph, None):
        compiled, eager = OnnxRuntimeBackend(bundle, threads=1, graph=graph), EagerBackend(step)
        for backend in (compiled, eager):
            backend.reserve(64)
            backend.step(13, {0: PROMPT})
        for size in (9, 1, 2, 5, 9):
            got, wanted = compiled.step(size), eager.step(size)
            assert got.count == wanted.count
            np.testing.assert_array_equal(compiled.drafts[:, :size], eager.drafts[:, :size])
        if reduced:
            assert set(compiled.drafts[0, 1:].tolist()) <= set(heads.token_map.tolist())
        assert decode(compiled, TREE, [PROMPT], expected, size=9, chunk=64, count=16, seed=None).tokens == expected


def test_one_node_drafts_nothing() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    eager = EagerBackend(make_step(model, random_heads(model)))
    eager.reserve(64)
    eager.step(13, {0: PROMPT})
    eager.step(1)
    assert eager.output is not None
    assert eager.output.head_logits is not None
    assert eager.output.head_logits.shape == (1, 0, 101)
    eager.step(2)
    assert eager.output.head_logits.shape == (1, 1, 101)


def test_layers_of_one_kind_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma2", num_hidden_layers=4)
    assert layer_reuse.kinds_of(layer_reuse.decoder_layers(model)) in ([0, 1, 0, 1], [0, 0, 0, 0])
    other = tiny_model("llama", num_hidden_layers=3)
    other.model.layers[2].self_attn.scaling *= 2
    assert layer_reuse.kinds_of(other.model.layers) == [0, 0, 2]


@pytest.mark.slow
def test_a_trace_of_every_layer_gives_the_same(stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = stock.export("qwen2")
    step, reused = exported.step, exported.bundle
    monkeypatch.setattr(onnx_trace, "kinds_of", lambda layers, _: list(range(len(layers))))
    traced = export(step, tmp_path / "traced")
    outcomes = []
    for bundle in (reused, traced):
        backend = OnnxRuntimeBackend(bundle, threads=1)
        outcomes.append(decode(backend, TREE, [PROMPT], [[]], size=9, chunk=5, count=16, seed=None).tokens)
    assert outcomes[0] == outcomes[1] == [greedy(tiny_model("qwen2"), PROMPT, 16)]


@pytest.mark.slow
def test_bfloat16_is_written_and_refused_on_a_cpu(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1).to(torch.bfloat16)
    step = make_step(model, random_heads(model))
    step.sampling = False  # such a graph is traced in half the time
    bundle = export(step, tmp_path / "bundle")
    onnx.checker.check_model(str(bundle.graph), full_check=True)
    assert bundle.dtype == "bfloat16"
    assert "neither fp32 nor fp16, and onnxruntime-cuda takes no other" in (
        bundle.graphs[ONNXRUNTIME_CUDA_GRAPH].left_out or ""
    )
    with pytest.raises(BackendError, match="Export it in fp32 or fp16"):
        OnnxRuntimeBackend(bundle)


@pytest.mark.slow
def test_a_template_that_the_runtime_refuses_is_not_exported(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama", num_hidden_layers=1), make_tokenizer()
    tokenizer.chat_template = "{% for %}"
    step = make_step(model, None, Tree())
    step.sampling = False  # a smaller graph, which is traced sooner
    with pytest.raises(ExportError, match=r"syntax error on line 1.*`with_tokenizer=False`"):
        export(step, tmp_path / "out", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "derived"), [(12, False), (24, True)])
def test_heads_that_are_odd_for_the_derived_graph(stock: Stock, head_dim: int, derived: bool) -> None:
    """ONNX Runtime's attention wants heads of a multiple of 8, and of 16 to rotate them: others do without."""
    options = {"num_hidden_layers": 1, "head_dim": head_dim}
    expected = [greedy(tiny_model("llama", **options), PROMPT, 12)]
    bundle = stock.export(heads=False, sampling=False, **options).bundle
    assert ("model.onnxruntime.onnx" in bundle.files) == derived
    backend = OnnxRuntimeBackend(bundle, threads=1)
    assert decode(backend, Tree(), [PROMPT], expected, size=1, chunk=5, count=12).tokens == expected


def test_graphs_hold_no_path_of_the_machine_that_made_them(tiny_bundle: Bundle) -> None:
    for name in (name for name in tiny_bundle.files if name.endswith(".onnx")):
        graph = (tiny_bundle.folder / name).read_bytes()
        assert b"trace.py" not in graph and b"site-packages" not in graph


def test_a_layer_that_computes_with_its_index_is_refused() -> None:
    from medusa_export.common.errors import ModelNotSupportedError

    model = tiny_model("llama")
    for layer in model.model.layers:
        forward = layer.forward

        def scaled(hidden, *args, _forward=forward, _layer=layer, **kwargs):
            return _forward(hidden * (_layer.self_attn.layer_idx + 1), *args, **kwargs)

        layer.forward = scaled
    with pytest.raises(ModelNotSupportedError, match="their own index"):
        build_graph(make_step(model, None, Tree()))


@pytest.mark.parametrize(("vocab_size", "split"), [(96, True), (1024, True), (101, False), (6 * 101, False)])
def test_the_best_token_is_found_in_the_best_block(vocab_size: int, split: bool) -> None:
    """Of equal logits the first wins, whichever blocks they are in."""
    shape = ["batch", "sequence", vocab_size]
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape)
    best = onnx.helper.make_tensor_value_info("best", onnx.TensorProto.INT64, shape[:2])
    nodes = [
        onnx.helper.make_node("Identity", ["given"], ["logits"]),
        onnx.helper.make_node("ArgMax", ["logits"], ["best"], axis=-1, keepdims=0),
    ]
    graph = onnx.helper.make_graph(
        nodes, "best", [onnx.helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, shape)], [best]
    )
    graph.value_info.append(logits)
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)]))
    SplitArgMax(StepFacts(margin=0, max_positions=64))(model)
    proto = ir.to_proto(model)
    proto.ir_version = IR_VERSION
    assert any(node.op_type == "ReduceMax" for node in proto.graph.node) == split
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    values = np.random.default_rng(0).integers(-5, 5, (2, 40, vocab_size)).astype(np.float32)
    values[0, 0] = -np.inf
    values[0, 1] = np.arange(vocab_size)
    (got,) = session.run(None, {"given": values})
    np.testing.assert_array_equal(got, values.argmax(-1))


def transposed_weights(graph: onnx.GraphProto, outer: frozenset[str] = frozenset()) -> list[str]:
    """Initializers that a graph, or a branch of it, transposes when it runs."""
    known = outer | {tensor.name for tensor in graph.initializer}
    found = [node.input[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in known]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += transposed_weights(attribute.g, known)
    return found


def as_loaded(bundle: Bundle, graph: str, target: Path) -> onnx.GraphProto:
    """A graph as ONNX Runtime runs it where all weights are as large as those that it does not transpose at load."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(target / graph)
    for key, value in {
        "optimization.constant_folding_max_output_size_in_bytes": "1",
        "session.model_external_initializers_file_folder_path": str(bundle.folder),
        "session.optimized_model_external_initializers_file_name": f"{graph}.data",
    }.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(bundle.folder / graph), options, providers=["CPUExecutionProvider"])
    return onnx.load(target / graph, load_external_data=False).graph


@pytest.mark.parametrize(
    ("family", "options", "tied"),  # options as in other tests, which share these bundles
    [
        ("llama", {}, False),
        pytest.param("gpt2", {"sampling": False, "max_position_embeddings": 64}, True, marks=pytest.mark.slow),
        pytest.param("qwen3", {"sampling": False}, True, marks=pytest.mark.slow),
    ],
)
def test_no_step_transposes_a_weight(
    stock: Stock, tmp_path: Path, family: str, options: dict[str, Any], tied: bool
) -> None:
    """Heads share the lm_head, and it may be the embedding too: it is stored once, and read as it is stored."""
    exported = stock.export(family, SEEDS.get(family, 0), **options)
    model = exported.step.model
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    graphs = [name for name in GRAPHS if name in exported.bundle.files]
    assert len(graphs) == len(GRAPHS)
    for graph in graphs:
        assert transposed_weights(as_loaded(exported.bundle, graph, tmp_path)) == []
    stored = onnx.load(exported.bundle.graph, load_external_data=False).graph.initializer
    assert sum(sorted(tensor.dims) == [64, 101] for tensor in stored) == (1 if tied else 2)
    places = [int(entry.value) for tensor in stored for entry in tensor.external_data if entry.key == "offset"]
    assert places and all(place % 4096 == 0 for place in places)

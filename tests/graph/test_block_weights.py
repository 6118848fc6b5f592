"""Bundles whose matrices are integers: the graphs, the bytes that they share, and what verify says of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import medusa_export
from medusa_export import WeightTypes
from medusa_export.cli import main
from medusa_export.common.errors import OptionError
from medusa_export.heads.modules import MedusaHeads
from medusa_export.models.blocks import round_to_nearest
from medusa_export.verification.stored_matrices import stored_matrices, use_stored_matrices
from medusa_runtime import Bundle, MedusaEngine
from medusa_runtime.bundles.bundle import GRAPH, GRAPHS, ONNXRUNTIME_CUDA_GRAPH
from support.decoding import make_step
from support.stock import Stock
from support.tiny_models import tiny_model
from support.verifying import failed, verify

PROMPT = [5, 17, 80, 3, 44]


@pytest.fixture(
    scope="module",
    params=["int4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "asymmetric int4"))],
)
def bundle(request: pytest.FixtureRequest, model_folder: Path, stock: Stock) -> Bundle:
    kind = request.param.removeprefix("asymmetric ")
    types = WeightTypes.all(kind, symmetric=kind == request.param)
    folder = stock.folder(
        f"tied-{request.param}",
        lambda out: medusa_export.export(model_folder, out, init_heads=2, top_k=2, weights=types),
    )
    return Bundle.load(folder)


@pytest.mark.slow
def test_the_standard_graph_holds_the_rounded_weights(bundle: Bundle) -> None:
    model, found = tiny_model("qwen3"), set()
    for stored in stored_matrices(bundle):
        start = 0
        for name in stored.weights:
            if name.startswith("heads."):
                continue
            weight = model.get_parameter(name.removeprefix("model."))
            rows = stored.blocks.dequantized()[start : start + len(weight)]
            expected = round_to_nearest(
                weight,
                stored.blocks.bits,
                stored.blocks.block_size,
                symmetric=bundle.weights.symmetric or stored.blocks.bits == 8,
                dtype=torch.float32,
            )
            assert torch.equal(rows, expected.dequantized()), name
            start += len(weight)
            found.add((name, stored.is_table))
    matrices = {f"model.{name}" for name, weight in model.named_parameters() if weight.ndim == 2}
    tied = {"model.lm_head.weight", "model.model.embed_tokens.weight"}
    assert {name for name, is_table in found if not is_table} - tied == matrices - tied
    for is_table in (True, False):
        assert len({(name, is_table) for name in tied} & found) == 1


def test_derived_graphs_read_the_same_bytes(bundle: Bundle) -> None:
    """No matrix of floating-point numbers is left, and derived graphs add nothing to the file of weights."""
    placed: dict[str, set[tuple[str, str]]] = {}
    for name in GRAPHS:
        graph = onnx.load(bundle.folder / name, load_external_data=False).graph
        placed[name] = {
            (entries["offset"], entries["length"])
            for tensor in graph.initializer
            if (entries := {entry.key: entry.value for entry in tensor.external_data})
        }
        if name != GRAPH:
            operators = [node.op_type for node in graph.node]
            assert operators.count("MatMulNBits") >= 4 * 2
            assert placed[name] <= placed[GRAPH]
            assert bundle.graphs[name].rewrites.get("skip_unused_heads") == (
                1 if name != ONNXRUNTIME_CUDA_GRAPH else None
            )
    floats = [
        tensor
        for tensor in onnx.load(bundle.graph, load_external_data=False).graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1 and "scales" not in tensor.name
    ]
    assert not [tensor.name for tensor in floats if math.prod(tensor.dims) > 4096]


@pytest.mark.slow
def test_every_matrix_of_heads_is_stored(tmp_path: Path) -> None:
    """The projection of heads too, and stacks of matrices that several heads multiply with at once."""
    model = tiny_model("llama")
    heads = MedusaHeads.fresh(
        2, model.get_output_embeddings(), num_layers=2, conditioned=True, token_map=torch.arange(48)
    )
    for layer in heads.residual_layers:
        nn.init.normal_(layer.weight, std=0.05)
    types = WeightTypes(heads="int8")
    bundle = medusa_export.export(model, tmp_path / "bundle", heads=heads, top_k=2, weights=types, sampling=False)
    stored = {name for matrix in stored_matrices(bundle) for name in matrix.weights}
    stacks = {f"heads.layers.{layer}.weight[{head}]" for layer in range(2) for head in range(2)}
    assert stored == stacks | {"heads.projections.0.weight"}
    step = make_step(model, heads, bundle.tree)
    before = heads.residual_layers[0].weight.clone()
    assert use_stored_matrices(step, bundle).passed
    assert not torch.equal(heads.residual_layers[0].weight, before)
    assert failed(verify(bundle, step)) == set()


@pytest.mark.slow
def test_untransposed_weights_are_stored_in_integers(tmp_path: Path) -> None:
    """Those of GPT-2's layers, which are [K, N]."""
    model = tiny_model("gpt2")
    bundle = medusa_export.export(model, tmp_path / "bundle", weights=WeightTypes(layers="int4"), sampling=False)
    stored = {name for matrix in stored_matrices(bundle) for name in matrix.weights}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert stored == {f"model.transformer.h.{layer}.{part}.weight.T" for layer in range(2) for part in parts}
    assert [str(facts) for facts in bundle.matrices if facts.part == "layers"] == ["8 int4, blocks of 32 with scales"]
    step = make_step(model, None, bundle.tree)
    assert use_stored_matrices(step, bundle).passed
    assert failed(verify(bundle, step)) == set()


def test_an_engine_decodes(bundle: Bundle) -> None:
    with MedusaEngine.load(bundle.folder) as engine:
        plain = engine.generate(PROMPT, max_new_tokens=16, tree_size=1)
    assert len(plain.token_ids) == 16


def test_inspect_says_if_answers_depend_on_the_tree_size(bundle: Bundle) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(bundle.folder)]).output
    assert "answers of ONNX Runtime on this processor:" in shown


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_verify(kind: str, model_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "onnx",
        model_folder,
        "--init-heads",
        "2",
        "--top-k",
        "2",
        "--weights",
        kind,
        "-o",
        tmp_path / "b",
        "-q",
    ]
    assert CliRunner().invoke(main, [str(argument) for argument in arguments]).exit_code == 0
    outcome = medusa_export.verify(tmp_path / "b", model_folder, max_new_tokens=8, tree_sizes=[1, "full"])
    assert [check.name for check in outcome.checks if not check.passed] == []
    names = {check.name for check in outcome.checks}
    assert {"stored weights", "tokens, plain decoding and the reference"} <= names


@pytest.mark.slow
def test_verify_finds_integers_of_another_model(model_folder: Path, tmp_path: Path) -> None:
    other = tiny_model("qwen3")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.neg_()
    other.save_pretrained(tmp_path / "other")
    medusa_export.export(tmp_path / "other", tmp_path / "b", weights="int8", sampling=False)
    outcome = medusa_export.verify(tmp_path / "b", model_folder, max_new_tokens=4, tree_sizes=[1])
    assert "stored weights" in [check.name for check in outcome.checks if not check.passed]


def test_options() -> None:
    types = WeightTypes.all("int4", block_size=128)
    assert (types.layers, types.lm_head, types.heads, types.embeddings) == ("int4", "int4", "int4", "int8")
    assert [types.block_for(columns) for columns in (4096, 576, 48, 100)] == [128, 64, 16, None]
    with pytest.raises(OptionError, match="The block size is 48"):
        WeightTypes(block_size=48)
    with pytest.raises(OptionError, match="no type 'int3'"):
        WeightTypes.all("int3")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="Embeddings can't be int4"):
        replace(types, embeddings="int4")

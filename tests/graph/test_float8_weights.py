"""Bundles whose matrices are 8-bit floating-point numbers: the graphs, what verify says of them, and engines."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

import medusa_export
from medusa_export import WeightTypes
from medusa_export.cli import main
from medusa_export.common.errors import EngineBuildError, OptionError
from medusa_export.models.float8 import round_to_float8
from medusa_export.targets.tensorrt.builder import EngineBuilder
from medusa_export.targets.tensorrt.options import BuildOptions, check_weights
from medusa_export.verification.stored_matrices import CHECK, stored_matrices
from medusa_runtime import Bundle, MedusaEngine
from medusa_runtime.backends.tensorrt.library import import_tensorrt
from medusa_runtime.bundles.bundle import ONNXRUNTIME_GRAPH
from medusa_runtime.bundles.compiled import EngineLimits
from support.stock import Stock
from support.tiny_models import tiny_model

PROMPT = [5, 17, 80, 3, 44]


@pytest.fixture(scope="module")
def bundle(model_folder: Path, stock: Stock) -> Bundle:
    def fill(out: Path) -> None:
        medusa_export.export(model_folder, out, init_heads=2, top_k=2, weights="fp8", sampling=False)

    return Bundle.load(stock.folder("tied-fp8", fill))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_rounded_with_a_scale_of_their_own(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 64) * torch.logspace(-3, 3, 8).unsqueeze(-1)
    weight[3] = 0
    rounded = round_to_float8(weight, dtype)
    found = rounded.dequantized()
    assert found.dtype == dtype and found.isfinite().all() and not found[3].any()
    largest = weight.abs().amax(-1, keepdim=True)
    assert ((found.float() - weight).abs() <= weight.abs() / 14 + largest / 2**14).all()


@pytest.mark.slow
def test_the_standard_graph_holds_the_rounded_weights(bundle: Bundle) -> None:
    model, found = tiny_model("qwen3"), set()
    assert bundle.weights.layers == "fp8" and bundle.weights.embeddings is None
    for stored in stored_matrices(bundle):
        start = 0
        for name in stored.weights:
            found.add(name)
            if name.startswith("heads."):
                continue
            weight = model.get_parameter(name.removeprefix("model."))
            rows = stored.blocks.dequantized()[start : start + len(weight)]
            assert torch.equal(rows, round_to_float8(weight, torch.float32).dequantized()), name
            start += len(weight)
    linears = {name for name, weight in model.named_parameters() if weight.ndim == 2 and "layers" in name}
    assert {f"model.{name}" for name in linears} <= found


@pytest.mark.slow
def test_onnxruntime_dequantizes_while_it_loads(bundle: Bundle, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(str(bundle.folder / ONNXRUNTIME_GRAPH), options)
    graph = onnx.load(tmp_path / "loaded.onnx", load_external_data=False).graph
    assert onnx.TensorProto.FLOAT8E4M3FN not in {tensor.data_type for tensor in graph.initializer}
    assert "DequantizeLinear" not in {node.op_type for node in graph.node}


@pytest.mark.slow
def test_answers_do_not_depend_on_the_tree_size(bundle: Bundle) -> None:
    with MedusaEngine.load(bundle.folder, threads=1) as engine:
        plain, tree = (engine.generate(PROMPT, max_new_tokens=16, tree_size=size) for size in (1, bundle.tree.size))
        assert plain.token_ids == tree.token_ids


@pytest.mark.slow
def test_verify_compares_with_the_rounded_weights(bundle: Bundle, model_folder: Path) -> None:
    outcome = medusa_export.verify(bundle.folder, model_folder, max_new_tokens=8, tree_sizes=[1, "full"])
    assert [check.name for check in outcome.checks if not check.passed] == []
    assert CHECK in {check.name for check in outcome.checks}


@pytest.mark.slow
def test_inspect_says_how_matrices_are_stored(bundle: Bundle) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(bundle.folder)]).output
    assert "fp8, a scale per row" in shown


@pytest.mark.slow
def test_engines_hold_them_from_sm89_on(bundle: Bundle) -> None:
    limits = EngineLimits(max_batch=2, capacity=96, max_prefill=32)
    builder = EngineBuilder(import_tensorrt("tensorrt-rtx"), bundle, BuildOptions(limits, ("sm89",), opt_level=0))
    built = builder.build()
    assert built.layers["DEQUANTIZE"] == len(list(stored_matrices(bundle)))
    assert b"CastMulCastFc" in bytes(built.data) or b"CastMulFc" in bytes(built.data)  # products read 8 bits
    check_weights(bundle, ("sm89", "sm120"))
    with pytest.raises(EngineBuildError, match="fp8 weights, which TensorRT takes from sm89 on, not for sm86"):
        check_weights(bundle, ("sm86", "sm89"))


def test_tables_are_refused() -> None:
    with pytest.raises(OptionError, match="Embeddings can't be fp8"):
        WeightTypes(embeddings="fp8")

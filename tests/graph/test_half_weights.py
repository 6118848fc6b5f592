"""Bundles that store matrices in 16 bits, and compute in 32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import medusa_export
from medusa_export import WeightTypes
from medusa_export.common.errors import ExportError, OptionError
from medusa_export.verification.stored_matrices import stored_bits, stored_matrices
from medusa_runtime import Bundle, MedusaEngine
from medusa_runtime.bundles.bundle import GRAPHS
from support.stock import Stock
from support.tiny_models import tiny_model

PROMPT = [5, 17, 80, 3, 44]


@pytest.fixture(scope="module")
def bundle(model_folder: Path, stock: Stock) -> Bundle:
    def fill(out: Path) -> None:
        medusa_export.export(model_folder, out, init_heads=2, top_k=2, weights="bf16", sampling=False)

    return Bundle.load(stock.folder("tied-bf16", fill))


@pytest.mark.slow
def test_every_matrix_is_stored_in_16_bits(bundle: Bundle) -> None:
    model, found = tiny_model("qwen3"), set()
    for stored in stored_matrices(bundle):
        start = 0
        for name in stored.weights:
            found.add((name, stored.is_table))
            if not name.startswith("heads."):
                weight = model.get_parameter(name.removeprefix("model."))
                rows = stored.blocks.dequantized()[start : start + len(weight)]
                assert torch.equal(rows, weight.bfloat16().float()), name
                start += len(weight)
    matrices = {f"model.{name}" for name, weight in model.named_parameters() if weight.ndim == 2}
    assert {name for name, is_table in found if not is_table and not name.startswith("heads.")} >= matrices - {
        "model.lm_head.weight",
        "model.model.embed_tokens.weight",
    }
    assert len({is_table for name, is_table in found if "embed" in name or "lm_head" in name}) == 2
    assert {facts.dtype for facts in bundle.matrices} == {"bfloat16"}
    assert stored_bits(bundle) == 16


@pytest.mark.slow
def test_graphs_share_the_bytes_and_derived_graphs_compute_in_fp32(bundle: Bundle) -> None:
    for name in GRAPHS:
        graph = onnx.load(bundle.folder / name, load_external_data=False).graph
        large = [tensor for tensor in graph.initializer if len(tensor.dims) > 1 and np.prod(tensor.dims) > 4096]
        assert {tensor.data_type for tensor in large} == {onnx.TensorProto.BFLOAT16}
        assert bundle.graphs[name].left_out is None
    with MedusaEngine.load(bundle.folder) as engine:
        assert len(engine.generate(PROMPT, max_new_tokens=16, tree_size=1).token_ids) == 16


@pytest.mark.slow
def test_verify_computes_with_the_stored_numbers(bundle: Bundle, model_folder: Path, tmp_path: Path) -> None:
    outcome = medusa_export.verify(
        bundle.folder, model_folder, max_new_tokens=8, tree_sizes=[1, "full"], offload=tmp_path
    )
    assert not list(tmp_path.iterdir())
    assert [check.name for check in outcome.checks if not check.passed] == []
    assert "stored weights" in {check.name for check in outcome.checks}


@pytest.mark.slow
def test_a_number_beyond_the_range_of_fp16_is_refused(model_folder: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = 1e5
    with pytest.raises(ExportError, match=r"layers.1.mlp.down_proj.weight.* beyond 65504, the largest of fp16"):
        medusa_export.export(model, tmp_path / "b", weights=WeightTypes(layers="fp16"), sampling=False)


@pytest.mark.parametrize(("dtype", "weights"), [("fp16", "fp32"), ("bf16", "fp32"), ("fp16", "bf16"), ("bf16", "fp16")])
def test_combinations_without_gain_are_refused(dtype: str, weights: str) -> None:
    with pytest.raises(OptionError, match=f"stored in {weights} where the bundle computes in {dtype}"):
        WeightTypes.all(weights).resolved(dtype)  # type: ignore[arg-type]


def test_the_type_that_a_bundle_computes_in_is_no_other_type() -> None:
    assert WeightTypes.all("fp16").resolved("fp16") == WeightTypes()
    mixed = WeightTypes(layers="int4", lm_head="bf16", embeddings="fp32").resolved("fp32")
    assert mixed == WeightTypes(layers="int4", lm_head="bf16")

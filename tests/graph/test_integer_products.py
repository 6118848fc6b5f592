"""Bundles whose products multiply 8-bit integers with 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import PreTrainedModel

import medusa_export
from medusa_export import ActivationRanges
from medusa_export.cli import main
from medusa_export.common.errors import CheckpointError, OptionError
from medusa_export.heads.modules import MedusaHeads
from medusa_export.models.activations import InputRange
from medusa_export.training.activations import measured
from medusa_export.training.conversations import Sample
from medusa_export.verification.integer_products import integer_products
from medusa_export.verification.stored_matrices import use_stored_matrices
from medusa_runtime import Bundle
from medusa_runtime.bundles.bundle import GRAPH, ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_GRAPH
from support.decoding import make_step, random_heads
from support.stock import Stock
from support.tiny_models import tiny_model
from support.verifying import failed, verify

# A layer whose inputs are said to lose too much.
KEPT = "model.layers.1.mlp.down_proj.weight"


def random_texts(vocab_size: int) -> list[Sample]:
    tokens = torch.randint(0, vocab_size, (4, 40), generator=torch.Generator().manual_seed(0))
    return [Sample(row, [True] * len(row)) for row in tokens.tolist()]


@dataclass(frozen=True)
class Exported:
    model: PreTrainedModel
    heads: MedusaHeads
    ranges: ActivationRanges
    bundle: Bundle


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, stock: Stock) -> Exported:
    model = tiny_model("qwen3")  # its embeddings are tied
    heads = random_heads(model)
    ranges = measured(model, random_texts(model.config.vocab_size))
    ranges = replace(ranges, inputs={**ranges.inputs, KEPT: replace(ranges.inputs[KEPT], error=0.5)})
    path = tmp_path_factory.mktemp("rounded") / "activations.safetensors"
    ranges.save(path)

    def fill(out: Path) -> None:
        medusa_export.export(model, out, heads=heads, top_k=2, weights="int8", activations=path, sampling=False)

    return Exported(model, heads, ranges, Bundle.load(stock.folder("integer-products", fill)))


def test_the_bundle_says_so(exported: Exported) -> None:
    assert exported.bundle.weights.activations == "int8"
    shown = CliRunner().invoke(main, ["inspect", str(exported.bundle.folder)]).output
    assert "products round their inputs to int8" in shown


def test_derived_graphs_multiply_integers_and_read_the_same_bytes(exported: Exported) -> None:
    layers = len(exported.model.model.layers)
    placed = {}
    for name in (GRAPH, ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH):
        graph = onnx.load(exported.bundle.folder / name, load_external_data=False).graph
        placed[name] = {
            (entries["offset"], entries["length"])
            for tensor in graph.initializer
            if (entries := {entry.key: entry.value for entry in tensor.external_data})
        }
        if name != GRAPH:
            # Queries, keys and values are one product, and so are gate and up. The last layer keeps one in blocks.
            assert [node.op_type for node in graph.node].count("MatMulIntegerToFloat") == 4 * layers - 1 + 1
            assert placed[name] <= placed[GRAPH]


def test_an_input_that_would_lose_too_much_keeps_its_precision(exported: Exported) -> None:
    rounded = {name.removeprefix("model.") for product in integer_products(exported.bundle) for name in product.weights}
    assert set(exported.ranges.inputs) - rounded == {KEPT}


def test_the_reference_computes_the_same(exported: Exported) -> None:
    """With rounded inputs and integers it agrees with each graph, and trees with plain decoding."""
    step = make_step(exported.model, exported.heads, exported.bundle.tree)
    assert use_stored_matrices(step, exported.bundle).passed
    outcome = verify(exported.bundle, step)
    assert failed(outcome) == set()
    exact = next(check for check in outcome.checks if check.name.startswith(f"{ONNXRUNTIME_GRAPH}: logits"))
    assert exact.figures["max_abs"] < 0.5


def test_factors_make_columns_of_unlike_ranges_alike() -> None:
    found = InputRange(torch.tensor([100.0, 1.0, 0.01, 0.0]))
    assert (found.maxima / found.factors).max() / (found.maxima / found.factors)[:3].min() < 30
    values = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) / 3 * found.maxima
    rounded = found.rounded(values)
    assert (rounded - values).abs().max() <= (found.factors * found.scale).max() / 2 + 1e-6
    assert torch.equal(found.rounded(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_values_beyond_the_range_are_cut_off() -> None:
    found = InputRange(torch.tensor([1.0, 1.0]))
    assert torch.allclose(found.rounded(torch.tensor([[5.0, -5.0]])), torch.tensor([[1.0, -128 / 127]]))


def test_ranges_are_read_as_they_were_written(exported: Exported, tmp_path: Path) -> None:
    exported.ranges.save(tmp_path / "ranges")
    found = ActivationRanges.load(tmp_path / "ranges")
    assert found.tokens == 160
    assert {name: one.error for name, one in found.inputs.items()} == pytest.approx(
        {name: one.error for name, one in exported.ranges.inputs.items()}
    )
    assert all(torch.equal(one.maxima, exported.ranges.inputs[name].maxima) for name, one in found.inputs.items())


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 40])
def test_files_that_are_no_ranges_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ranges").write_bytes(content)
    with pytest.raises(CheckpointError, match="can't be read"):
        ActivationRanges.load(tmp_path / "ranges")


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "ranges")
    with pytest.raises(CheckpointError, match="holds no activation ranges"):
        ActivationRanges.load(tmp_path / "ranges")


@pytest.mark.parametrize("weights", [None, "int4"])
def test_ranges_need_matrices_of_int8(weights: medusa_export.WeightTypes | None, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="give int8 weights"):
        medusa_export.export(
            "absent", tmp_path / "bundle", weights=weights, activations=ActivationRanges(), init_heads=1
        )

"""``medusa-export quantize`` on a tiny model: the checkpoint, and the bundle that is made of it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import medusa_export
from medusa_export import MedusaWarning, OptionError
from medusa_export.models.checkpoints import load_model
from medusa_export.verification.stored_matrices import stored_matrices
from support.cli import run
from support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def quantized(tiny_model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    code, output = run(
        "quantize", tiny_model_folder, "--data", data, "--wide", "down_proj", "--no-smoothing", "-o", folder, "-q"
    )
    assert code == 0, output
    assert "14 matrices of 4." in output
    return folder


def test_transformers_reads_the_same_weights(tiny_model_folder: Path, data: Path, tmp_path: Path) -> None:
    """Its reader takes one kind of integers per model, so no matrix is wide here."""
    folder = tmp_path / "model"
    made = medusa_export.quantize(tiny_model_folder, folder, [data], block_size=16)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).state_dict()
    assert len(made) == 14
    for name, matrix in made.items():
        assert torch.equal(theirs[f"{name}.weight"], matrix.dequantized()), name


def test_the_weights_are_those_of_the_model_up_to_rounding(quantized: Path) -> None:
    rounded, original = load_model(str(quantized), dtype=torch.float32).state_dict(), tiny_model("llama").state_dict()
    assert rounded.keys() == original.keys()
    for name, weight in original.items():
        distance = float((rounded[name] - weight).norm() / weight.norm())
        inside = name.startswith("model.layers") and name.endswith("proj.weight")
        least, most = ((1e-4, 0.02) if "down_proj" in name else (0.02, 0.3)) if inside else (0.0, 0.0)
        assert least <= distance <= most, name


@pytest.mark.slow
def test_a_bundle_stores_the_integers_of_the_checkpoint(quantized: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MedusaWarning)
        bundle = medusa_export.export(quantized, tmp_path / "bundle", sampling=False, weights="int4")
    assert not [warning for warning in caught if "dequantized" in str(warning.message)]
    state = load_model(str(quantized), dtype=torch.float32).state_dict()
    for stored in stored_matrices(bundle):
        if all("layers" in name for name in stored.weights):
            expected = torch.cat([state[name.removeprefix("model.")] for name in stored.weights])
            assert torch.equal(stored.blocks.dequantized(), expected), stored.weights
            assert stored.blocks.bits == (8 if "down_proj" in stored.weights[0] else 4)


def test_a_name_that_no_layer_has_is_refused(tiny_model_folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No linear layer is named 'mlp': `wide` takes down_proj, gate_proj"):
        medusa_export.quantize(tiny_model_folder, tmp_path / "model", [data], wide=["mlp"])

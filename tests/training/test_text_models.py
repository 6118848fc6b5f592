"""Data, heads, measurements and quantized weights for the text model of a larger model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medusa_export import export, quantize
from medusa_export.common.errors import ModelNotSupportedError
from medusa_export.models.checkpoints import load_model, open_model
from medusa_export.models.text_model import check_stands_alone
from medusa_export.trees.calibration import Calibration
from support.cli import run
from support.distilling import distilled
from support.larger_models import larger_model
from support.tiny_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    larger_model("llava").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_every_command_names_the_option(larger: Path, data: Path, tmp_path: Path) -> None:
    for command, *options in (
        (("distill",), "--magpie", 1),
        (("train",), "--data", data),
        (("calibrate",), "--heads", tmp_path, "--data", data),
        (("activations",), "--data", data),
        (("quantize",), "--data", data),
        (("heads", "convert"), "--heads", tmp_path, "--dtype", "fp32"),
    ):
        code, output = run(*command, larger, *options, "-o", tmp_path / command[0], "-q")
        assert code == 1, (command, output)
        assert "with --text-only" in output, (command, output)


def test_heads_of_a_text_model_are_trained_measured_and_converted(larger: Path, data: Path, tmp_path: Path) -> None:
    code, output = distilled(larger, tmp_path / "made", "--text-only", "--magpie", 2)
    assert code == 0, output
    heads, measured, ranges = tmp_path / "heads", tmp_path / "calibration.json", tmp_path / "ranges.safetensors"
    for arguments in (
        ("train", larger, "--data", data, "-o", heads, "--num-heads", 2, "--epochs", 1),
        ("calibrate", larger, "--data", data, "-o", measured, "--heads", heads),
        ("activations", larger, "--data", data, "-o", ranges),
        ("heads", "convert", larger, "--heads", heads, "-o", tmp_path / "converted"),
    ):
        code, output = run(*arguments, "--text-only", "-q")
        assert code == 0, (arguments[0], output)
    assert len(Calibration.load(measured).accuracies) == 2
    assert not any("vision" in name for name in load_file(ranges))


def test_a_quantized_text_model_is_a_model_of_its_own(larger: Path, data: Path, tmp_path: Path) -> None:
    quantized = quantize(larger, tmp_path / "int4", [data], text_only=True)
    assert len(quantized) == 21
    alone = load_model(str(tmp_path / "int4"), dtype=torch.float32).state_dict()
    whole = load_model(str(larger), dtype=torch.float32, text_only=True).state_dict()
    assert alone.keys() == whole.keys()
    assert torch.equal(alone["lm_head.weight"], whole["lm_head.weight"])


@pytest.mark.slow
def test_the_quality_of_a_bundle_of_a_text_model(larger: Path, data: Path, tmp_path: Path) -> None:
    export(larger, tmp_path / "bundle", text_only=True, sampling=False)
    report = tmp_path / "report.json"
    options = ("--model", larger, "--data", data, "--limit", 2, "--json", report, "--text-only", "-q")
    code, output = run("quality", tmp_path / "bundle", *options)
    assert code == 0, output
    assert json.loads(report.read_text())["bundles"][0]["closeness"]["divergence"] < 1e-5


def test_a_text_model_that_is_no_model_of_its_own_is_not_written(tmp_path: Path) -> None:
    larger_model("qwen2_5_vl").save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), dtype=torch.float32, text_only=True)
    with pytest.raises(ModelNotSupportedError, match="qwen2_5_vl_text"):
        check_stands_alone(opened.model)

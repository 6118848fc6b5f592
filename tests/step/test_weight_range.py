"""Weights that are no finite numbers in the type of the export."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from medusa_export.cli import main
from medusa_export.common.errors import ExportError
from medusa_export.models.checkpoints import load_model
from medusa_export.step.step import MedusaStep
from medusa_export.step.weight_range import WeightRange
from medusa_runtime import Tree
from support.decoding import make_step, random_heads
from support.tiny_models import tiny_model

PLACE = "model.layers.1.mlp.down_proj.weight"


def saved(folder: Path, value: float) -> Path:
    model = tiny_model("llama")
    model.get_parameter(PLACE)[3, 17] = value
    model.save_pretrained(folder)
    return folder


def check_all(step: MedusaStep, source: str) -> None:
    for name, weight in step.named_parameters():
        WeightRange(step, source).check(name, weight.detach())


def export(model: Path, target: Path, *options: str) -> Result:
    heads = options or ("--no-heads",)
    return CliRunner().invoke(main, ["onnx", str(model), *heads, "--greedy-only", "-o", str(target), "-q"])


def opened(folder: Path, dtype: torch.dtype) -> MedusaStep:
    return make_step(load_model(str(folder), dtype=dtype), None, Tree())


@pytest.mark.slow
def test_an_export_checks_weights(tmp_path: Path) -> None:
    result = export(saved(tmp_path / "model", 1e6), tmp_path / "bundle", "--no-heads", "--dtype", "fp16")
    assert result.exit_code == 1
    assert "Export it with --dtype fp32 or --dtype bf16." in result.output
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("value", [1e6, -70_000.0])
def test_a_weight_beyond_the_type_is_refused_by_name_and_value(tmp_path: Path, value: float) -> None:
    model = saved(tmp_path / "model", value)
    with pytest.raises(ExportError) as error:
        check_all(opened(model, torch.float16), str(model))
    message = str(error.value)
    assert f"The weight {PLACE} of the model is {value:g} at [3, 17]" in message
    assert "the largest number of float16 is 65504. Export it with `dtype='fp32'` or `dtype='bf16'`." in message
    for dtype in (torch.float32, torch.bfloat16):
        wide = tiny_model("llama").to(dtype)
        wide.get_parameter(PLACE)[3, 17] = value
        check_all(make_step(wide, random_heads(wide)), str(model))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_checkpoint_without_a_number_is_refused_for_every_type(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    model = saved(tmp_path / "model", value)
    with pytest.raises(ExportError) as error:
        check_all(opened(model, dtype), str(model))
    expected = f"The weight {PLACE} of the model is {value} at [3, 17] in its file, which no `dtype` repairs"
    assert expected in str(error.value)


def test_heads_are_looked_at_too() -> None:
    model = tiny_model("llama").half()
    heads = random_heads(model)
    check_all(make_step(model, heads), "nowhere")
    heads.layers[0].weight[2, 5, 6] = 1e6
    with pytest.raises(
        ExportError, match=r"layers\.0\.weight of the heads is inf at \[2, 5, 6\] in float16.*`dtype='fp32'`"
    ):
        check_all(make_step(model, heads), "nowhere")


def test_the_largest_number_of_a_type_is_one(tmp_path: Path) -> None:
    model = tiny_model("llama").half()
    model.get_parameter(PLACE)[3, 17] = 65504.0
    check_all(make_step(model, random_heads(model)), str(tmp_path))

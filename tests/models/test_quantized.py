"""Checkpoints with packed weights: they load with the values that their formats define."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    PreTrainedModel,
    TorchAoConfig,
)

from medusa_export.common.errors import CheckpointError, MissingExtraError
from medusa_export.models.checkpoints import load_model, open_model
from medusa_export.verification.weights import weights_check
from support.packed_models import write_awq, write_compressed, write_fp8, write_gptq, write_with_transformers

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

COMPRESSED = {
    "int4 in groups": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4 with zero points": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "packed int8": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 with zero points": (
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ),
    "fp8 per matrix": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 per row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
}


def assert_ordinary(model: PreTrainedModel) -> None:
    assert not hasattr(model.config, "quantization_config")
    assert getattr(model, "hf_quantizer", None) is None


def assert_holds(source: Path, dtype: torch.dtype, expected: dict[str, Tensor]) -> None:
    """Loads and opens a model, and compares both with the expected weights, bit for bit."""
    loaded, opened = load_model(str(source), dtype=dtype), open_model(str(source), dtype=dtype)
    assert_ordinary(loaded)
    assert set(opened.readers) == {name for name, _ in loaded.named_parameters()} >= set(expected)
    for name, weight in loaded.named_parameters():
        assert torch.equal(opened.readers[name](), weight), name
        if name in expected:
            assert torch.equal(weight, expected[name]), name
    check = weights_check(str(source), loaded, str(dtype).removeprefix("torch."))
    assert (check.mismatches, check.notes) == (0, [])
    assert check.compared == sum(weight.numel() for weight in loaded.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors_load_as_transformers_loads_them(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layout, weights = COMPRESSED[kind]
    source = write_compressed(tmp_path / "model", dtype, layout, **weights)
    theirs = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert_holds(source, dtype, dict(theirs.named_parameters()))


def test_compressed_tensors_are_rounded_once(tmp_path: Path) -> None:
    """transformers multiplies in the dtype of the scales, even if fp32 is asked for."""
    layout, weights = COMPRESSED["int4 in groups"]
    source = write_compressed(tmp_path / "model", torch.bfloat16, layout, **weights)
    theirs = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    ours = load_model(str(source), dtype=torch.float32)
    for name, weight in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name).bfloat16().float(), weight), name


def test_compressed_tensors_with_groups_in_another_order(tmp_path: Path) -> None:
    layout, weights = COMPRESSED["int4 in groups"]
    source = write_compressed(tmp_path / "model", torch.float32, layout, **weights)
    name, file = "model.layers.0.self_attn.q_proj", source / "model.safetensors"
    before = load_model(str(source), dtype=torch.float32).get_parameter(f"{name}.weight")
    tensors = load_file(file)
    scales, order = tensors[f"{name}.weight_scale"], torch.arange(64) // 32
    integers = (before / scales[:, order]).round()
    tensors[f"{name}.weight_g_idx"] = (1 - order).to(torch.int32)
    save_file(tensors, file, {"format": "pt"})
    opened = open_model(str(source), dtype=torch.float32)
    assert torch.equal(opened.readers[f"{name}.weight"](), integers * scales[:, 1 - order])
    assert f"{name}.weight" not in opened.blocks


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_loads_as_transformers_loads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_fp8(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert_holds(source, dtype, dict(theirs.named_parameters()))


GPTQ: dict[str, Callable[[Path], tuple[Path, dict[str, Tensor]]]] = {
    "int4": write_gptq,
    "int4, symmetric": lambda folder: write_gptq(folder, symmetric=True),
    "int4, desc_act": lambda folder: write_gptq(folder, desc_act=True),
    "int4, second layout": lambda folder: write_gptq(folder, layout="gptq_v2"),
    "int8": lambda folder: write_gptq(folder, bits=8, group_size=16),
    "int2": lambda folder: write_gptq(folder, bits=2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GPTQ)
def test_gptq(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, expected = GPTQ[kind](tmp_path / "model")
    assert_holds(source, dtype, {name: weight.to(dtype) for name, weight in expected.items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_awq(dtype: torch.dtype, tmp_path: Path) -> None:
    source, expected = write_awq(tmp_path / "model")
    assert_holds(source, dtype, {name: weight.to(dtype) for name, weight in expected.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bitsandbytes_loads_as_transformers_loads_it(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        packing = BitsAndBytesConfig(load_in_8bit=True)
    else:
        packing = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=kind == "nf4"
        )
    source = write_with_transformers(tmp_path, dtype, packing)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map="cpu").dequantize()
    assert_holds(source, dtype, dict(theirs.named_parameters()))


@pytest.mark.parametrize("kind", ["int8", "int4 in groups", "fp8"])
def test_torchao_loads_as_transformers_loads_it(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    packings = {
        "int8": Int8WeightOnlyConfig(),
        "int4 in groups": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "fp8": Float8WeightOnlyConfig(),
    }
    source = write_with_transformers(tmp_path, torch.bfloat16, TorchAoConfig(packings[kind]))
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map="cpu")
    packed = {name: weight for name, weight in theirs.named_parameters() if type(weight.data) is not Tensor}
    assert len(packed) == 14
    expected = {**dict(theirs.named_parameters()), **{name: weight.dequantize() for name, weight in packed.items()}}
    assert_holds(source, torch.bfloat16, expected)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_a_library_that_is_not_installed_is_named(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = write_gptq(tmp_path / "model")
    settings = json.loads((source / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method}
    (source / "config.json").write_text(json.dumps(settings))
    monkeypatch.setitem(sys.modules, method, None)
    with pytest.raises(MissingExtraError, match=rf"'{method}'.*medusa-export\[quantized\]"):
        load_model(str(source), dtype=torch.float32)


def test_generation_settings_are_kept(tmp_path: Path) -> None:
    source, _ = write_gptq(tmp_path / "model")
    file = source / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [7, 9]}))
    assert load_model(str(source), dtype=torch.float32).generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize(
    ("write", "setting", "value"),
    [(write_gptq, "bits", 3), (write_gptq, "checkpoint_format", "marlin"), (write_awq, "version", "gemv")],
)
def test_layouts_that_are_not_known_are_refused(
    write: Callable[[Path], tuple[Path, object]], setting: str, value: object, tmp_path: Path
) -> None:
    source, _ = write(tmp_path / "model")
    settings = json.loads((source / "config.json").read_text())
    settings["quantization_config"][setting] = value
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"{value}.*can't be read: expected"):
        load_model(str(source), dtype=torch.float32)

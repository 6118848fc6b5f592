"""Small checkpoints with packed weights, written by the libraries of their formats or from the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from medusa_export.models.blocks import round_to_nearest
from medusa_export.models.quantized.integers import pack_words
from support.tiny_models import tiny_model

GROUP = 32
# The eight integers of a word, from its lowest bits, as AutoAWQ's packer lists them.
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def packed_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of a model that quantizers pack, by name: all but the output projection."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


def write_compressed(folder: Path, dtype: torch.dtype, layout: str, **weights: Any) -> Path:
    """Writes a checkpoint with the library compressed-tensors.

    Args:
        folder: The folder, which is created.
        dtype: The dtype of the scales and of the weights that are not packed.
        layout: The library's name of the format.
        weights: The arguments of the library's ``QuantizationArgs`` for weights.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = tiny_model("llama").to(dtype)
    # The library writes weights that are not packed only for models whose activations are quantized too.
    inputs = QuantizationArgs(num_bits=8, type=weights["type"], strategy="token", dynamic=True)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if layout == "pack-quantized" else inputs,
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=layout, quantization_status="compressed", ignore=["lm_head"]
    )
    apply_quantization_config(model, config)
    for module in packed_linears(model).values():
        ranges = _ranges(module.weight.detach(), weights["strategy"], weights.get("group_size"))
        scales, zero_points = calculate_qparams(*ranges, scheme.weights)
        module.weight_scale.data.copy_(scales)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero_points)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def _ranges(weight: Tensor, strategy: str, group_size: int | None) -> tuple[Tensor, Tensor]:
    if strategy == "group":
        weight = weight.unflatten(1, (-1, group_size))
    if strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    return (weight.amin(-1), weight.amax(-1)) if strategy == "group" else (weight.amin(-1, True), weight.amax(-1, True))


def write_with_transformers(folder: Path, dtype: torch.dtype, packing: Any) -> Path:
    """Writes a checkpoint that transformers quantizes while it loads a model, with the library of the format."""
    tiny_model("llama").to(dtype).save_pretrained(folder / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "plain", dtype=dtype, quantization_config=packing, device_map="cpu"
    )
    model.save_pretrained(folder / "packed")
    return folder / "packed"


def write_fp8(folder: Path) -> Path:
    """Writes a checkpoint of fine-grained fp8, with tiles of 32 by 32."""
    model = tiny_model("llama").to(torch.bfloat16)
    state = dict(model.state_dict())
    for name, module in packed_linears(model).items():
        rows, columns = module.weight.shape
        tiles = module.weight.detach().float().view(rows // 32, 32, columns // 32, 32)
        scales = tiles.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        state[f"{name}.weight"] = (tiles / scales).to(torch.float8_e4m3fn).view(rows, columns)
        state[f"{name}.weight_scale_inv"] = scales.view(rows // 32, columns // 32)
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head"]}
    return _write(folder, model, state, settings)


def write_gptq(
    folder: Path,
    *,
    bits: int = 4,
    symmetric: bool = False,
    desc_act: bool = False,
    layout: str = "gptq",
    group_size: int = GROUP,
) -> tuple[Path, dict[str, Tensor]]:
    """Writes a checkpoint in the layout of AutoGPTQ.

    Returns:
        The folder, and the matrices that the integers stand for, in fp64.
    """

    def packed(values: Tensor, zero_points: Tensor, scales: Tensor, group_of: Tensor) -> dict[str, Tensor]:
        stored = zero_points - 1 if layout == "gptq" else zero_points
        return {
            "qweight": _words(values, bits).T.contiguous(),
            "qzeros": _words(stored.T, bits),
            "scales": scales.T.contiguous(),
            "g_idx": group_of.to(torch.int32),
        }

    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": symmetric,
        "checkpoint_format": layout,
    }
    return _write_integers(folder, settings, packed, symmetric=symmetric, shuffled=desc_act)


def write_awq(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Writes a checkpoint in the layout of AutoAWQ. It returns what ``write_gptq`` does."""

    def packed(values: Tensor, zero_points: Tensor, scales: Tensor, _: Tensor) -> dict[str, Tensor]:
        ordered = [part.T.reshape(part.shape[1], -1, 8)[..., _AWQ_ORDER].flatten(1) for part in (values, zero_points)]
        return {
            "qweight": _words(ordered[0], 4),
            "qzeros": _words(ordered[1], 4),
            "scales": scales.T.contiguous(),
        }

    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _write_integers(folder, settings, packed, symmetric=False, shuffled=False)


_Pack = Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]


def _write_integers(
    folder: Path, settings: dict[str, Any], packed: _Pack, *, symmetric: bool, shuffled: bool
) -> tuple[Path, dict[str, Tensor]]:
    model = tiny_model("llama").to(torch.float16)
    state = dict(model.state_dict())
    expected = {}
    top = 2 ** settings["bits"]
    random = torch.Generator().manual_seed(0)
    for name, module in packed_linears(model).items():
        weight = module.weight.detach().float()
        columns = weight.shape[1]
        group_of = torch.arange(columns) // settings["group_size"]
        if shuffled:
            group_of = group_of[torch.randperm(columns, generator=random)]
        groups = weight[:, group_of.argsort()].unflatten(1, (-1, settings["group_size"]))
        low, high = groups.amin(-1), groups.amax(-1)
        if symmetric:
            scales = (groups.abs().amax(-1) / (top // 2 - 1)).half()
            zero_points = torch.full(scales.shape, top // 2)
        else:
            scales = ((high - low) / (top - 1)).half()
            zero_points = (-low / scales).round().long().clamp(1, top - 1)
        values = (weight / scales[:, group_of] + zero_points[:, group_of]).round().long().clamp(0, top - 1)
        del state[f"{name}.weight"]
        parts = packed(values, zero_points, scales, group_of)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        expected[f"{name}.weight"] = (values - zero_points[:, group_of]).double() * scales[:, group_of].double()
    return _write(folder, model, state, settings), expected


def _words(values: Tensor, bits: int) -> Tensor:
    """Packs integers along their rows in words of 32 bits, the first in the lowest bits."""
    parts = values.long().unflatten(1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
    return parts.sum(-1).to(torch.int32)


def _write(folder: Path, model: PreTrainedModel, state: dict[str, Tensor], settings: dict[str, Any]) -> Path:
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def write_packed_experts(folder: Path) -> Path:
    """Writes a Mixtral whose experts' matrices are packed by the layout of compressed-tensors, int4 in groups of 32."""
    model = tiny_model("mixtral", num_hidden_layers=1)
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if ".experts." in name]:
        matrix = round_to_nearest(state.pop(name), 4, GROUP, symmetric=False, dtype=torch.float32)
        assert matrix.zero_points is not None
        state |= {
            f"{name}_packed": pack_words(matrix.values, 4),
            f"{name}_scale": matrix.scales,
            f"{name}_shape": torch.tensor(matrix.values.shape),
            f"{name}_zero_point": pack_words(matrix.zero_points.T, 4).T.contiguous(),
        }
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return _write(folder, model, state, settings)

"""Writes a model with quantized matrices as a checkpoint of compressed-tensors, which other tools read too.

``medusa_export.models.quantized.compressed`` describes the tensors and reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_export.common.errors import OutputError
from medusa_export.common.files import WRITE_ERRORS, atomic_folder
from medusa_export.models.blocks import Bits, BlockWeight
from medusa_export.models.checkpoints import save_tokenizer
from medusa_export.models.quantized.integers import pack_words


def save_quantized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    matrices: Mapping[str, BlockWeight],
    folder: Path,
    *,
    replace_existing: bool = True,
) -> None:
    """Writes a checkpoint.

    Args:
        model: The model that the matrices are of.
        tokenizer: The model's tokenizer; None to write none.
        matrices: The quantized matrices, by the names of their modules.
        folder: The folder to write.
        replace_existing: Replace a folder that is there.

    Raises:
        OutputError: It can't be written.
    """
    state = {
        name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in matrices
    }
    for name, matrix in matrices.items():
        state |= {f"{name}.{part}": tensor for part, tensor in _packed(matrix).items()}
    try:
        with atomic_folder(folder, replace_existing=replace_existing) as partial:
            save_torch_state_dict({name: tensor.cpu() for name, tensor in state.items()}, partial)
            model.generation_config.save_pretrained(partial)
            config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
            config["quantization_config"] = _settings(matrices)
            text = json.dumps(config, indent=2, default=lambda value: str(value).removeprefix("torch."))
            (partial / "config.json").write_text(text + "\n", encoding="utf-8")
            if tokenizer is not None:
                save_tokenizer(tokenizer, partial)
    except WRITE_ERRORS as error:
        raise OutputError(f"The model can't be written to {folder}: {error}.") from error


def _packed(matrix: BlockWeight) -> dict[str, Tensor]:
    """The tensors of a matrix, by the last part of their names."""
    parts = {
        "weight_packed": pack_words(matrix.values, matrix.bits),
        "weight_scale": matrix.scales,
        "weight_shape": torch.tensor(matrix.values.shape),
    }
    if matrix.zero_points is not None:
        parts["weight_zero_point"] = pack_words(matrix.zero_points.T, matrix.bits).T.contiguous()
    return parts


def _settings(matrices: Mapping[str, BlockWeight]) -> dict[str, Any]:
    """The ``quantization_config``: a group of modules for each number of bits."""
    by_kind: dict[tuple[Bits, int], list[str]] = {}
    for name, matrix in matrices.items():
        by_kind.setdefault((matrix.bits, matrix.block_size), []).append(name)
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": bits == 8,
                "strategy": "group",
                "group_size": size,
                "dynamic": False,
            },
        }
        for number, ((bits, size), names) in enumerate(by_kind.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": groups,
    }

"""Heads in the formats of other projects, and the logits that they must give."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medusa_export.heads.modules import MedusaHeads
from support.tiny_models import VOCAB_SIZE, tiny_model

HIDDEN = 64
MODEL = tiny_model("llama")
STATE = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(7))


def draw(*shape: int, seed: int) -> Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(num_heads: int = 3, num_layers: int = 1, *, shared: bool = False, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of the reference implementation's heads."""
    tensors = {}
    for k in range(num_heads):
        for j in range(num_layers):
            tensors[f"{prefix}{k}.{j}.linear.weight"] = draw(HIDDEN, HIDDEN, seed=100 * k + j)
            tensors[f"{prefix}{k}.{j}.linear.bias"] = draw(HIDDEN, seed=100 * k + 10 + j)
        if not shared:
            tensors[f"{prefix}{k}.{num_layers}.weight"] = draw(VOCAB_SIZE, HIDDEN, seed=100 * k + 20)
    return tensors


def vllm(tensors: dict[str, Tensor], num_layers: int = 1, prefix: str = "") -> dict[str, Tensor]:
    """The same heads with vLLM's names, and without biases, like most of vLLM's checkpoints."""
    renamed = {}
    for name, tensor in tensors.items():
        k, j, *rest = name.split(".")
        if rest == ["linear", "weight"]:
            renamed[f"{prefix}blocks.{k}.layers.{j}.weight"] = tensor
        elif rest == ["weight"]:
            assert int(j) == num_layers
            renamed[f"{prefix}lm_heads.{k}.weight"] = tensor
    return renamed


def expected_logits(tensors: dict[str, Tensor], num_heads: int = 3, num_layers: int = 1) -> Tensor:
    """[3, K, V], the paper's formula on a file in the reference's names."""
    outputs = []
    for k in range(num_heads):
        hidden = STATE
        for j in range(num_layers):
            weight = tensors[f"{k}.{j}.linear.weight"]
            bias = tensors.get(f"{k}.{j}.linear.bias", torch.zeros(HIDDEN))
            hidden = hidden + nn.functional.silu(hidden @ weight.T + bias)
        outputs.append(hidden @ tensors.get(f"{k}.{num_layers}.weight", MODEL.lm_head.weight).T)
    return torch.stack(outputs, dim=1)


def without_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}


def written(folder: Path, tensors: dict[str, Tensor], name: str = "medusa_lm_head.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder


def check(heads: MedusaHeads, tensors: dict[str, Tensor], num_heads: int = 3, num_layers: int = 1) -> None:
    assert (heads.config.num_heads, heads.config.num_layers) == (num_heads, num_layers)
    torch.testing.assert_close(heads(STATE), expected_logits(tensors, num_heads, num_layers))
    assert not heads.training
    assert not any(parameter.requires_grad for parameter in heads.parameters())

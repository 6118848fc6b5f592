"""Multi-head latent attention.

Its ``expand_kv`` writes the two parts of a key into a new tensor. In ONNX that copies all keys four times. Here, the
parts are concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medusa_export.step.adapters.replacement import Replacement


def latent_adapter(module: nn.Module) -> Iterator[Replacement]:
    """Makes a layer expand its latent cache without copies."""
    if hasattr(module, "expand_kv"):
        yield Replacement(module, "expand_kv", partial(_expanded, module))


def _expanded(attention: Any, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """``expand_kv``.

    Args:
        attention: The attention layer.
        latent: [B, 1, C, kv_lora_rank], from which keys and values are computed.
        rotated: [B, 1, C, qk_rope_head_dim], the rotated part of a key, which all heads share.

    Returns:
        Keys [B, N, C, qk_head_dim] and values [B, N, C, v_head_dim].
    """
    sizes = [attention.qk_nope_head_dim, attention.v_head_dim]
    by_heads = attention.kv_b_proj(latent).squeeze(1).unflatten(2, (-1, sum(sizes))).transpose(1, 2)
    key, value = by_heads.split(sizes, dim=-1)
    return torch.cat([key, rotated.expand(-1, key.shape[1], -1, -1)], dim=-1), value

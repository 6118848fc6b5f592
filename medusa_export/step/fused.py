"""Kernels of steps that run in PyTorch on a GPU: caches are written in place, and attention is one fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_export.step.attention import StepKernels, attention
from medusa_export.step.slots import block_slots


def write_in_place(cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """Does what ``cache_scatter`` does, in the memory of ``cache``."""
    index = block_slots(write_indices, update.shape[2])[:, None, :, None].expand_as(update)
    cache.scatter_(2, index, update)
    return cache


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Does what ``attention`` does, with PyTorch's ``scaled_dot_product_attention``.

    PyTorch's fastest kernels that take a mask don't take grouped queries. In memory, queries of a group
    [B, N · G, S, d] are also [B, N, G · S, d], so that attention of the key/value heads alone computes the same.
    It has no soft cap: such attention is computed in parts.
    """
    if softcap:
        in_parts: Tensor = attention(query, key, value, mask, scale, softcap)
        return in_parts
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    by_group = query.reshape(batch, kv_heads, -1, head_dim)
    if mask.shape[1] == 1:  # the same for all heads
        mask = mask.expand(batch, heads // kv_heads, length, -1)
    mask = mask.reshape(batch, -1, by_group.shape[2], mask.shape[3])
    output = torch.nn.functional.scaled_dot_product_attention(by_group, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, heads, length, value.shape[3])


FUSED = StepKernels(write_in_place, fused_attention)

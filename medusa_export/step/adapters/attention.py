"""Attention layers that don't call transformers' attention interface.

1. The forward of BLOOM, MPT and Falcon computes biases and masks of its own. Another forward replaces it.
2. GPT-J, GPT-Neo and CodeGen have a method ``_attn`` that takes queries and cached keys and values. It is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from medusa_export.compat.transformers import CACHE
from medusa_export.step.adapters.replacement import Replacement
from medusa_export.step.alibi import Alibi, RoundedAlibi, bloom_slopes, mpt_slopes
from medusa_export.step.attention import attention_forward


def attention_adapter(module: nn.Module) -> Iterator[Replacement]:
    """Makes an attention layer call our attention function."""
    part: Any = module
    name = type(module).__name__
    if name in _FORWARDS:
        yield Replacement(module, "forward", partial(_FORWARDS[name], module))
    if name in _WITH_ATTN:
        yield Replacement(module, "_attn", partial(_attn, module))
        if not hasattr(module, "layer_idx"):
            yield Replacement(module, "layer_idx", part.layer_id)


def _bloom(
    attention: Any, hidden_states: Tensor, residual: Tensor, *, layer_past: Any, **_: object
) -> tuple[Tensor, None]:
    """``BloomAttention.forward``."""
    mixed = attention.query_key_value(hidden_states).unflatten(2, (attention.num_heads, 3, attention.head_dim))
    query, key, value = (mixed.select(3, part).transpose(1, 2) for part in range(3))
    key, value = layer_past.update(key, value, attention.layer_idx)
    bias = Alibi(bloom_slopes(attention.num_heads))
    output = attention_forward(attention, query, key, value, None, attention.inv_norm_factor, bias=bias)[0]
    return residual + attention.dense(output.flatten(2)), None


def _mpt(attention: Any, hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
    """``MptAttention.forward``."""
    mixed = attention.Wqkv(hidden_states)
    if attention.clip_qkv:
        mixed = mixed.clamp(min=-attention.clip_qkv, max=attention.clip_qkv)
    query, key, value = (
        part.unflatten(2, (attention.n_heads, attention.head_dim)).transpose(1, 2) for part in mixed.chunk(3, dim=2)
    )
    key, value = given[CACHE].update(key, value, attention.layer_idx)
    bias = Alibi(mpt_slopes(attention.n_heads))
    output = attention_forward(attention, query, key, value, None, attention.softmax_scale, bias=bias)[0]
    return attention.out_proj(output.flatten(2)), None


def _falcon(
    attention: Any, hidden_states: Tensor, alibi: Tensor | None, *, layer_past: Any, **given: Any
) -> tuple[Tensor, None]:
    """``FalconAttention.forward``. The cache holds the keys of groups of heads once, not once per head."""
    groups = attention.num_heads // attention.num_kv_heads
    mixed = attention.query_key_value(hidden_states)
    mixed = mixed.unflatten(2, (attention.num_kv_heads, groups + 2, attention.head_dim))
    query = mixed[:, :, :, :-2].flatten(2, 3).transpose(1, 2)
    key, value = (mixed[:, :, :, place].transpose(1, 2) for place in (-2, -1))
    bias = None
    if alibi is None:
        rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
        query, key = rotate(query, key, *given["position_embeddings"])
    else:
        bias = RoundedAlibi(bloom_slopes(attention.num_heads), attention.inv_norm_factor)
    key, value = layer_past.update(key, value, attention.layer_idx)
    output = attention_forward(attention, query, key, value, None, attention.inv_norm_factor, bias=bias)[0]
    return attention.dense(output.flatten(2)), None


def _attn(attention: Any, query: Tensor, key: Tensor, value: Tensor, _: Tensor | None = None) -> tuple[Tensor, None]:
    """``_attn`` of GPT-J, GPT-Neo and CodeGen. GPT-Neo does not scale scores, and its local layers have a window."""
    scale = 1.0 / getattr(attention, "scale_attn", 1.0)
    window = attention.config.window_size if getattr(attention, "attention_type", None) == "local" else None
    output = attention_forward(attention, query, key, value, None, scale, window)[0]
    return output.transpose(1, 2), None


_FORWARDS: dict[str, Callable[..., tuple[Tensor, None]]] = {
    "BloomAttention": _bloom,
    "MptAttention": _mpt,
    "FalconAttention": _falcon,
}
_WITH_ATTN = frozenset({"GPTJAttention", "GPTNeoSelfAttention", "CodeGenAttention"})

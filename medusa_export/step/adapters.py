"""Adapters for models that compute by themselves what only a step knows. They hold while a model runs in a step.

1. The attention of BLOOM and MPT does not call transformers' attention interface. Its own forward is replaced by one
   that calls our attention function, with ALiBi as slopes.
2. Llama 4 scales queries by positions that it takes from the length of the cache. Our attention function scales them by
   the positions of the step.
3. Rotary embeddings of Llama 4 and DeepSeek V2 are products of complex numbers, which ONNX does not have. They are
   computed with pairs of numbers.
4. Rotary embeddings of the kinds ``dynamic`` and ``longrope`` look at the largest position of a batch. They keep to the
   frequencies of sequences of up to the original length, which is the limit of such a model
   (``models.supported.max_positions``).
5. The sparse activations of Gemma 3n take the quantile of a normal distribution from a constant. ONNX has no operator
   for it, so the quantile is computed here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_export.compat.transformers import using_attention
from medusa_export.models.supported import is_length_dependent
from medusa_export.step.alibi import bloom_slopes, mpt_slopes
from medusa_export.step.attention import attention_forward

# Models that compute nothing but shapes from the length of the cache.
_ONLY_SHAPES = frozenset({"opt", "bloom", "mpt"})


def only_shapes_from_length(model: PreTrainedModel) -> bool:
    """Whether a model may ask for the length of the cache: what it does with it changes no result."""
    return model.config.model_type in _ONLY_SHAPES


def reset_frequencies(model: PreTrainedModel) -> None:
    """Gives rotary embeddings that depend on the length the frequencies of short sequences.

    A long sequence that the model has run leaves others behind. The model's own runs choose theirs again.
    """
    for module in model.modules():
        if is_length_dependent(getattr(module, "rope_type", None)):
            for name, buffer in module.named_buffers(recurse=False):
                original = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
                if original is not None:
                    buffer.data.copy_(original)
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                setattr(module, name, module.original_max_seq_len)


@contextmanager
def adapted(model: PreTrainedModel) -> Iterator[None]:
    """Makes a model fit a step while the block lasts."""
    with ExitStack() as stack:
        for module in model.modules():
            forward = _FORWARDS.get(type(module).__name__)
            if forward is not None:
                stack.enter_context(_replaced(module, "forward", functools.partial(forward, module)))
            if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale"):
                stack.enter_context(_replaced(module, "attn_temperature_tuning", False))
                if not module.use_rope:
                    stack.enter_context(_replaced(module, "query_scale", functools.partial(_llama4_scale, module)))
            axis = _COMPLEX_ROTARY.get(type(module).__name__)
            if axis is not None:
                code = sys.modules[type(module).__module__]
                stack.enter_context(_replaced(module, "forward", functools.partial(_angles, module)))
                stack.enter_context(_replaced(code, "apply_rotary_emb", functools.partial(_rotated, axis)))
            if type(module).__name__ == "Gemma3nTextMLP":
                stack.enter_context(_replaced(module, "_gaussian_topk", functools.partial(_largest, module)))
            if is_length_dependent(getattr(module, "rope_type", None)):
                stack.enter_context(_replaced(module, "rope_type", _fixed(module.rope_type)))
        if model.config.model_type == "mpt":  # it builds a mask, which nothing reads then
            stack.enter_context(using_attention(model, "eager"))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    """Sets an attribute of an instance while the block lasts."""
    own = vars(module)
    before = own.get(name)
    existed = name in own
    own[name] = value
    try:
        yield
    finally:
        if existed:
            own[name] = before
        else:
            del own[name]


def _fixed(rope_type: str | dict[str, str]) -> str | dict[str, str]:
    """A kind of rotary embedding that does not look at lengths, or one per kind of layer."""
    if isinstance(rope_type, str):
        return "default"
    return {kind: "default" if is_length_dependent(one) else one for kind, one in rope_type.items()}


def _llama4_scale(module: Any, positions: Tensor) -> Tensor:
    """The factor of the queries [B, S] at some positions, as in ``Llama4TextAttention``."""
    floors = torch.floor((positions.float() + 1.0) / float(module.floor_scale))
    return torch.log1p(floors) * float(module.attn_scale) + 1.0


def _angles(rotary: Any, _: Tensor, position_ids: Tensor) -> Tensor:
    """Cosines and sines of a rotary embedding, [B, S, d / 2, 2]."""
    angles = position_ids.float().unsqueeze(2) * rotary.inv_freq.float()
    return torch.stack([angles.cos(), angles.sin()], dim=-1) * float(rotary.attention_scaling)


def _rotated(axis: int, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates neighbouring numbers of queries and keys; ``axis`` is that of the heads."""
    cos, sin = angles.unsqueeze(axis).unbind(-1)

    def turned(states: Tensor) -> Tensor:
        first, second = states.float().reshape(*states.shape[:3], -1, 2).unbind(-1)
        pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
        return pairs.flatten(3).type_as(states)

    return turned(query), turned(key)


def _largest(mlp: Any, inputs: Tensor) -> Tensor:
    """``Gemma3nTextMLP._gaussian_topk``: sets all but the largest activations to zero, as if they were normal."""
    deviations = NormalDist().inv_cdf(mlp.activation_sparsity)
    cutoff = inputs.mean(-1, keepdim=True) + inputs.std(-1, keepdim=True, unbiased=False) * deviations
    return torch.relu(inputs - cutoff)


def _bloom(
    attention: Any, hidden_states: Tensor, residual: Tensor, *, layer_past: Any, **_: object
) -> tuple[Tensor, None]:
    """``BloomAttention.forward``, with our attention function."""
    mixed = attention.query_key_value(hidden_states).unflatten(2, (attention.num_heads, 3, attention.head_dim))
    query, key, value = (mixed.select(3, part).transpose(1, 2) for part in range(3))
    key, value = layer_past.update(key, value, attention.layer_idx)
    slopes = bloom_slopes(attention.num_heads)
    output = attention_forward(attention, query, key, value, None, attention.inv_norm_factor, slopes=slopes)[0]
    return residual + attention.dense(output.flatten(2)), None


def _mpt(attention: Any, hidden_states: Tensor, *, past_key_values: Any, **_: object) -> tuple[Tensor, None]:
    """``MptAttention.forward``, with our attention function."""
    mixed = attention.Wqkv(hidden_states)
    if attention.clip_qkv:
        mixed = mixed.clamp(min=-attention.clip_qkv, max=attention.clip_qkv)
    query, key, value = (
        part.unflatten(2, (attention.n_heads, attention.head_dim)).transpose(1, 2) for part in mixed.chunk(3, dim=2)
    )
    key, value = past_key_values.update(key, value, attention.layer_idx)
    slopes = mpt_slopes(attention.n_heads)
    output = attention_forward(attention, query, key, value, None, attention.softmax_scale, slopes=slopes)[0]
    return attention.out_proj(output.flatten(2)), None


_FORWARDS: dict[str, Callable[..., tuple[Tensor, None]]] = {"BloomAttention": _bloom, "MptAttention": _mpt}

# Classes of rotary embeddings with complex numbers, and the axis of the heads in the states that they rotate.
_COMPLEX_ROTARY = {"Llama4TextRotaryEmbedding": 2, "DeepseekV2RotaryEmbedding": 1}

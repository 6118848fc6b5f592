"""Positions: rotary embeddings, and factors of queries that depend on the position.

1. Rotary embeddings of Llama 4 and DeepSeek V2 are products of complex numbers, which ONNX does not have. They are
   computed with pairs of numbers.
2. Rotary embeddings of the kinds ``dynamic`` and ``longrope`` look at the largest position of a batch. With
   ``longrope`` each row takes the frequencies of long or of short requests, as the step's inputs say. All others keep
   to the frequencies of sequences of up to the original length, which is the limit of such a model
   (``models.supported.max_positions``).
3. Llama 4 scales queries by positions that it takes from the length of the cache. Our attention function scales them by
   the positions of the step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from medusa_export.models.supported import is_length_dependent
from medusa_export.step.adapters.replacement import Replacement, replaced

# Classes of rotary embeddings with complex numbers, and the axis of the heads in the states that they rotate.
_COMPLEX = {"Llama4TextRotaryEmbedding": 2, "DeepseekV2RotaryEmbedding": 1}


def rotary_adapter(module: nn.Module) -> Iterator[Replacement]:
    """Replaces the code of rotary embeddings and attention layers that computes from positions in its own way."""
    part: Any = module
    axis = _COMPLEX.get(type(module).__name__)
    if axis is not None:
        yield Replacement(module, "forward", partial(_angles, module))
        yield Replacement(sys.modules[type(module).__module__], "apply_rotary_emb", partial(_rotated, axis))
    if is_length_dependent(getattr(module, "rope_type", None)):
        yield Replacement(module, "rope_type", _fixed(part.rope_type))
    if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale"):
        yield Replacement(module, "attn_temperature_tuning", False)
        if not part.use_rope:
            yield Replacement(module, "query_scale", partial(_llama4_scale, module))


def rows_of_two_lengths(model: PreTrainedModel, is_long: Tensor) -> Iterator[Replacement]:
    """Replaces rotary embeddings with two sets of frequencies by ones that choose between them in each row.

    Args:
        model: A model with ``short_positions``.
        is_long: [B] boolean, True in rows of long requests.
    """
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            yield Replacement(module, "forward", partial(_of_two_lengths, module, is_long))


def _of_two_lengths(rotary: Any, is_long: Tensor, states: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
    """Cosines and sines of a rotary embedding [B, S, d], by the frequencies of each row's request."""
    original = rotary.config.rope_parameters["original_max_position_embeddings"]
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, states.device, seq_len=original + 1)
    tables = []
    for frequencies in (long, rotary.original_inv_freq):
        with replaced(Replacement(rotary, "inv_freq", frequencies)):
            tables.append(type(rotary).forward(rotary, states, position_ids))
    chosen = is_long.view(-1, 1, 1)
    return tuple(torch.where(chosen, one, other) for one, other in zip(*tables, strict=True))


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

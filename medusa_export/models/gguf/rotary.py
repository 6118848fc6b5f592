"""The rotary embeddings of a GGUF file, as settings of transformers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_export.common.errors import ModelNotSupportedError
from medusa_export.models.gguf.metadata import LONG_FACTORS, ROPE_FREQS, SHORT_FACTORS, Metadata

# The keys that the settings come from.
ROTARY_KEYS = frozenset(
    {
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)


def apply_rotary(config: Any, metadata: Metadata, *, may_rotate_part: bool) -> None:
    """Sets the size of heads, the part of a head that is rotated, the frequencies, and their scaling.

    Args:
        config: The configuration. It is changed in place.
        metadata: The file's metadata.
        may_rotate_part: True if the architecture may rotate a part of each head only.

    Raises:
        CheckpointError: The metadata says something that can't be kept.
        ModelNotSupportedError: The model needs something that a step can't honour.
    """
    head_dim = metadata.get("attention.key_length", config.hidden_size // config.num_attention_heads)
    if metadata.get("attention.value_length", head_dim) != head_dim:
        raise ModelNotSupportedError("keys and values of more than one size")
    config.head_dim = head_dim
    rotated = metadata.get("rope.dimension_count", head_dim)
    if rotated != head_dim and not may_rotate_part:
        raise metadata.error(f"rotates {rotated} of {head_dim} channels of a head (rope.dimension_count)")
    parameters = {"rope_theta": float(metadata.get("rope.freq_base", 10000.0)), **_scaling(metadata, rotated)}
    if may_rotate_part:
        part = rotated / head_dim
        # transformers rounds the product down.
        parameters["partial_rotary_factor"] = part if int(head_dim * part) == rotated else math.nextafter(part, 2)
    config.rope_parameters = parameters
    if parameters["rope_type"] == "longrope":
        config.original_max_position_embeddings = parameters["original_max_position_embeddings"]


def _scaling(metadata: Metadata, rotated: int) -> dict[str, Any]:
    """The scaling of positions, as ``rope_parameters`` without the base frequency."""
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 0.0)) or 1.0)
    kind = metadata.get("rope.scaling.type", "linear")
    attention = float(metadata.get("rope.scaling.attn_factor", 1.0))
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise metadata.error(f"scales positions in a way that isn't known here (rope.scaling.type {kind!r})")
    if kind == "longrope" or not metadata.factors.keys().isdisjoint((LONG_FACTORS, SHORT_FACTORS)):
        if kind in ("linear", "yarn") and factor != 1:
            raise metadata.error(f"scales positions twice, by rope.scaling and by {LONG_FACTORS} or {SHORT_FACTORS}")
        return _longrope(metadata, rotated, attention)
    if attention != 1 and kind != "yarn":
        raise metadata.error(f"says rope.scaling.attn_factor = {attention} for {kind!r} positions")
    scaled = kind != "none" and factor != 1
    freqs = metadata.factors.get(ROPE_FREQS)
    if freqs is not None and not np.all(freqs == 1):
        if scaled:
            raise metadata.error(f"scales positions twice, by rope.scaling and by {ROPE_FREQS}")
        return _llama3(metadata, freqs, rotated)
    if not scaled:
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    extrapolation = metadata.get("rope.scaling.yarn_ext_factor", 1.0)
    if extrapolation not in (1.0, -1.0):  # below 0 is 'as usual'
        raise metadata.error(f"says rope.scaling.yarn_ext_factor = {extrapolation}; only 1 can be kept")
    # transformers' attention_factor is the whole product; llama.cpp multiplies its factor by the second term.
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(
            metadata.get("rope.scaling.original_context_length") or metadata.get("context_length")
        ),
        "attention_factor": attention * (1 + 0.1 * math.log(factor)) if factor > 1 else attention,
        "beta_fast": float(metadata.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(metadata.get("rope.scaling.yarn_beta_slow", 1.0)),
    }


def _longrope(metadata: Metadata, rotated: int, attention: float) -> dict[str, Any]:
    """The settings of LongRoPE, whose factors are tensors of the file."""
    factors = [metadata.factors.get(name) for name in (LONG_FACTORS, SHORT_FACTORS)]
    original = metadata.get("rope.scaling.original_context_length")
    if original is None or any(given is None or len(given) != rotated // 2 for given in factors):
        raise metadata.error(
            f"scales positions by LongRoPE, but lacks rope.scaling.original_context_length, or {rotated // 2} numbers "
            f"in {LONG_FACTORS} and in {SHORT_FACTORS}"
        )
    long, short = (given.tolist() for given in factors if given is not None)
    return {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": int(original),
        "attention_factor": attention,
    }


def _llama3(metadata: Metadata, given: NDArray[np.float32], rotated: int) -> dict[str, Any]:
    """The settings of Llama 3.1's scaling from which a file's ``rope_freqs`` were computed."""
    if len(given) != rotated // 2:
        raise metadata.error(f"has {len(given)} factors in {ROPE_FREQS} for {rotated // 2} frequencies")
    theta = float(metadata.get("rope.freq_base", 10000.0))
    wavelengths = 2 * np.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    factor, low, high = float(given.max()), 1.0, 4.0  # all published models have these two
    for original in (2**exponent for exponent in range(4, 24)):
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), given, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise metadata.error(f"divides frequencies by factors that aren't those of Llama 3.1's scaling ({ROPE_FREQS})")

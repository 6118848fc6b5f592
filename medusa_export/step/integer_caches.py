"""Caches of 8-bit integers: keys and values rounded with one scale per entry and head.

An entry is rounded once, when its token is computed. All later steps read and move the integers and their scale, so
rounding never happens twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medusa_export.common.errors import ModelNotSupportedError
from medusa_runtime.bundles.states import State

_LARGEST = 127


def rounded(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds entries to 8-bit integers.

    An entry that holds NaN or infinity gets a scale that is not finite. ONNX Runtime's ``ReduceMax`` skips NaN, so the
    scale is computed from the mean, too. The mean exceeds the maximum in the last bit at most. An entry of zeros has a
    scale of 0, and its integers are undefined.

    Args:
        entries: [B, N, S, d].

    Returns:
        The integers, int8 of the same shape, and their scales, [B, N, S, 1] in fp32.
    """
    sizes = entries.abs()
    largest = torch.maximum(sizes.amax(-1, keepdim=True), sizes.mean(-1, keepdim=True))
    scales = largest.float() / _LARGEST
    return torch.round(entries / scales).to(torch.int8), scales


def restored(integers: Tensor, scales: Tensor) -> Tensor:
    """The numbers that stand for rounded entries, [B, N, C, d] in fp32."""
    return integers.to(torch.float32) * scales


def scale_name(name: str) -> str:
    """The name of the state with the scales of a state: ``key_scale_3`` for ``key_3``."""
    role, layer = name.rsplit("_", 1)
    return f"{role}_scale_{layer}"


def with_integers(states: Sequence[State]) -> list[State]:
    """The states of a step with 8-bit caches: each becomes integers, followed by their scales.

    Raises:
        ModelNotSupportedError: A state is a compressed form of keys and values.
    """
    if any(state.kind == "latent" for state in states):
        raise ModelNotSupportedError("a latent cache together with `kv_cache='int8'`")
    return [
        each
        for state in states
        for each in (
            replace(state, dtype="int8"),
            replace(state, name=scale_name(state.name), kind="scale", shape=(state.shape[0], 1), dtype="float32"),
        )
    ]

"""ALiBi: biases of attention scores that grow with distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alibi:
    """Biases of BLOOM and MPT: each head's slope times the distance.

    Attributes:
        slopes: The slope of each head.
    """

    slopes: tuple[float, ...]

    def of(self, new: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
        """The biases between new tokens at positions [B, S] and entries at [B, C]: [B, num_attention_heads, S, C]."""
        slopes = torch.tensor(self.slopes, dtype=dtype).view(1, -1, 1, 1)
        return slopes * (entries.unsqueeze(1) - new.unsqueeze(2)).unsqueeze(1).to(dtype)


@dataclass(frozen=True)
class RoundedAlibi:
    """Biases of Falcon: each head's slope times the position of the key, rounded to bfloat16, times the scale.

    The rounding makes them differ from ``Alibi``'s by more than a constant per query.

    Attributes:
        slopes: The slope of each head.
        scale: The factor of the scores.
    """

    slopes: tuple[float, ...]
    scale: float

    def of(self, new: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
        """The biases for entries at positions [B, C], [B, num_attention_heads, 1, C]; ``new`` has no influence."""
        slopes = torch.tensor(self.slopes).bfloat16().float().view(1, -1, 1, 1)
        positions = entries.float().bfloat16().float().unsqueeze(1).unsqueeze(1)
        return (slopes * positions).bfloat16().to(dtype) * self.scale


def bloom_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes of BLOOM and Falcon: powers of a base. Heads beyond a power of two have those of a second base."""
    power = 2 ** math.floor(math.log2(num_heads))
    first, second = _base(power), _base(2 * power)
    slopes = [first**exponent for exponent in range(1, power + 1)]
    slopes += [second**exponent for exponent in range(1, 2 * (num_heads - power), 2)]
    return tuple(slopes)


def mpt_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes of MPT: those of the next power of two, every second one first."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** -(8 * number / power) for number in range(1, power + 1)]
    if power != num_heads:
        slopes = [*slopes[1::2], *slopes[::2]][:num_heads]
    return tuple(slopes)


def _base(num_heads: int) -> float:
    return float(2 ** -(2 ** -(math.log2(num_heads) - 3)))

"""Matrices of 8-bit floating-point numbers with a scale per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class Float8Weight:
    """A matrix W [N, K]: W = values · scale, each row with its own scale.

    Attributes:
        values: [N, K], numbers of 4 bits of exponent and 3 of mantissa (e4m3).
        scales: [N], in the dtype that W is computed in.
    """

    values: Tensor
    scales: Tensor

    def dequantized(self) -> Tensor:
        """W, in the dtype of the scales."""
        return self.values.to(self.scales.dtype) * self.scales.unsqueeze(-1)


def round_to_float8(weight: Tensor, dtype: torch.dtype) -> Float8Weight:
    """Rounds a matrix: the largest value of each row becomes the largest number of 8 bits.

    Args:
        weight: [N, K].
        dtype: The dtype of the scales. Values are rounded with the scale in this dtype.
    """
    numbers = weight.float()
    scales = (numbers.abs().amax(-1) / _LARGEST).to(dtype)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales.float())
    values = (numbers * inverse.unsqueeze(-1)).clamp(-_LARGEST, _LARGEST).to(FLOAT8)
    return Float8Weight(values, scales)

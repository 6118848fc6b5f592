"""Matrices of 4-bit or 8-bit integers with a scale per block of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[4, 8]


@dataclass(frozen=True)
class BlockWeight:
    """A matrix W [N, K] in blocks of columns: W = (values - zero point) · scale, each block with its own two.

    Attributes:
        bits: The bits per value.
        block_size: The columns per block; it divides K.
        values: [N, K] uint8, each below 2 to the power of ``bits``.
        scales: [N, K / block_size], in the dtype that W is computed in.
        zero_points: [N, K / block_size] uint8; None if all are in the middle of the range, 2 to the power of
            ``bits - 1``.
    """

    bits: Bits
    block_size: int
    values: Tensor
    scales: Tensor
    zero_points: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        assert columns % self.block_size == 0
        assert self.scales.shape == (rows, columns // self.block_size)
        assert self.zero_points is None or self.zero_points.shape == self.scales.shape

    @property
    def middle(self) -> int:
        """The middle of the range of values."""
        return 1 << (self.bits - 1)

    def dequantized(self) -> Tensor:
        """W, in the dtype of the scales."""
        rows, columns = self.values.shape
        blocks = self.values.view(rows, -1, self.block_size).to(self.scales.dtype)
        zero_points = self.middle if self.zero_points is None else self.zero_points.unsqueeze(-1)
        return ((blocks - zero_points) * self.scales.unsqueeze(-1)).view(rows, columns)

    def packed(self) -> Tensor:
        """The values as bytes, [N, K · bits / 8]. Of two 4-bit values in a byte, the first is in the low half."""
        if self.bits == 8:
            return self.values
        return self.values[:, ::2] | self.values[:, 1::2] << 4


def round_to_nearest(
    weight: Tensor, bits: Bits, block_size: int, *, symmetric: bool, dtype: torch.dtype
) -> BlockWeight:
    """Quantizes a matrix: each value becomes the nearest number that its block can hold.

    Args:
        weight: [N, K].
        bits: The bits per value.
        block_size: The columns per block; it must divide K.
        symmetric: Put the zero points in the middle of the range. Otherwise each block has its own.
        dtype: The dtype of the scales. Values are rounded with the scale in this dtype.
    """
    blocks = weight.to(torch.float32).reshape(len(weight), -1, block_size)
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    low, high = blocks.amin(-1), blocks.amax(-1)
    if symmetric:
        # The value farthest from 0 gets the end of the range that has one number more.
        scales = torch.where(high > -low, high, low) / -middle
        zero_points = None
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = (high - low) / top
    scales = scales.to(dtype).to(torch.float32)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    if not symmetric:
        zero_points = (-low * inverse).round().clamp(0, top)
    offset = middle if zero_points is None else zero_points.unsqueeze(-1)
    values = (blocks * inverse.unsqueeze(-1)).round().add(offset).clamp(0, top).to(torch.uint8).flatten(1)
    return BlockWeight(
        bits, block_size, values, scales.to(dtype), None if zero_points is None else zero_points.to(torch.uint8)
    )

"""Matrices of 4-bit or 8-bit integers with a scale per block of columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[4, 8]
# Rows that are rounded at once. Rounding takes several times their size.
_ROWS = 256


@dataclass(frozen=True)
class BlockWeight:
    """A matrix W [N, K] in blocks of columns: W = (values - zero point) · scale + offset, each per block.

    Attributes:
        bits: The bits per value.
        block_size: The columns per block; it divides K.
        values: [N, K] uint8, each below 2 to the power of ``bits``.
        scales: [N, K / block_size], in the dtype that W is computed in.
        zero_points: [N, K / block_size] uint8; None if all are in the middle of the range, 2 to the power of
            ``bits - 1``.
        offsets: [N, K / block_size], in the dtype of the scales; None if all are 0.
    """

    bits: Bits
    block_size: int
    values: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.values.shape
        assert columns % self.block_size == 0
        assert self.scales.shape == (rows, columns // self.block_size)
        assert self.zero_points is None or self.zero_points.shape == self.scales.shape
        assert self.offsets is None or self.offsets.shape == self.scales.shape

    @property
    def middle(self) -> int:
        """The middle of the range of values."""
        return 1 << (self.bits - 1)

    @property
    def is_finite(self) -> bool:
        """True if all numbers of W are finite for sure: no scale and offset is close to the range of its dtype."""
        largest = self.scales.abs() * (1 << self.bits)
        if self.offsets is not None:
            largest = largest + self.offsets.abs()
        return bool(largest.isfinite().all())

    def dequantized(self) -> Tensor:
        """W, in the dtype of the scales."""
        rows, columns = self.values.shape
        blocks = self.values.view(rows, -1, self.block_size).to(self.scales.dtype)
        zero_points = self.middle if self.zero_points is None else self.zero_points.unsqueeze(-1)
        scaled = (blocks - zero_points) * self.scales.unsqueeze(-1)
        moved = scaled if self.offsets is None else scaled + self.offsets.unsqueeze(-1)
        return moved.view(rows, columns)

    def split(self, block_size: int, dtype: torch.dtype) -> BlockWeight:
        """The same matrix in smaller blocks, with scales in another dtype.

        Args:
            block_size: The columns per block; it must divide the block size of this matrix.
            dtype: The dtype of the scales.
        """
        assert self.block_size % block_size == 0
        times = self.block_size // block_size
        zero_points = None if self.zero_points is None else self.zero_points.repeat_interleave(times, 1)
        scales = self.scales.repeat_interleave(times, 1).to(dtype)
        offsets = None if self.offsets is None else self.offsets.repeat_interleave(times, 1).to(dtype)
        return BlockWeight(self.bits, block_size, self.values, scales, zero_points, offsets)

    def packed(self) -> Tensor:
        """The values as bytes, [N, K · bits / 8]. Of two 4-bit values in a byte, the first is in the low half."""
        return self.values if self.bits == 8 else pack(self.values)


def pack(values: Tensor) -> Tensor:
    """4-bit values [N, K] as bytes [N, K / 2], the first of two in the low half."""
    return values[:, ::2] | values[:, 1::2] << 4


def joined(parts: Sequence[BlockWeight]) -> BlockWeight:
    """The rows of several matrices with blocks of the same bits and size as one matrix."""
    (bits, block_size), *others = {(part.bits, part.block_size) for part in parts}
    assert not others
    zero_points = None
    if any(part.zero_points is not None for part in parts):
        zero_points = torch.cat(
            [
                torch.full(part.scales.shape, part.middle, dtype=torch.uint8)
                if part.zero_points is None
                else part.zero_points
                for part in parts
            ]
        )
    offsets = None
    if any(part.offsets is not None for part in parts):
        offsets = torch.cat([torch.zeros_like(part.scales) if part.offsets is None else part.offsets for part in parts])
    values, scales = torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts])
    return BlockWeight(bits, block_size, values, scales, zero_points, offsets)


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
    values = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(weight), weight.shape[1] // block_size, dtype=dtype, device=weight.device)
    zero_points = torch.empty_like(scales, dtype=torch.uint8)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        rounded = _rounded(weight[rows], bits, block_size, symmetric=symmetric, dtype=dtype)
        values[rows], scales[rows], zero_points[rows] = rounded
    return BlockWeight(bits, block_size, values, scales, None if symmetric else zero_points)


def _rounded(
    weight: Tensor, bits: Bits, block_size: int, *, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales and zero points of some rows."""
    blocks = weight.to(torch.float32).reshape(len(weight), -1, block_size)
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    low, high = blocks.amin(-1), blocks.amax(-1)
    if symmetric:
        # The value farthest from 0 gets the end of the range that has one number more.
        scales = torch.where(high > -low, high, low) / -middle
    else:
        scales = (high.clamp(min=0) - low.clamp(max=0)) / top
    scales = scales.to(dtype)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales.float())
    if symmetric:
        zero_points = torch.full_like(scales, middle, dtype=torch.uint8)
    else:
        zero_points = (-low.clamp(max=0) * inverse).round().clamp(0, top).to(torch.uint8)
    values = (blocks * inverse.unsqueeze(-1)).round().add(zero_points.unsqueeze(-1)).clamp(0, top)
    return values.to(torch.uint8).flatten(1), scales, zero_points

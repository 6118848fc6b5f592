"""Integers of few bits in words of 32 bits, and matrices of such integers with scales per group of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_export.models.blocks import Bits, BlockWeight


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The unsigned integers in 32-bit words, the lowest bits first.

    Args:
        words: [R, C] int32.
        bits: The bits per integer; they divide 32.

    Returns:
        [R, C · 32 / bits] uint8.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(1)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """The inverse of ``unpack_words``; rows whose words are not full are filled up with zeros.

    Args:
        values: [R, C] uint8, each below 2 to the power of ``bits``.
        bits: The bits per integer; they divide 32.

    Returns:
        [R, C · bits / 32] int32, rounded up.
    """
    count = 32 // bits
    filled = torch.nn.functional.pad(values, (0, -values.shape[1] % count)).to(torch.int64)
    words = (filled.view(len(filled), -1, count) << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def grouped(bits: int, values: Tensor, scales: Tensor, zero_points: Tensor | None) -> BlockWeight:
    """A matrix whose columns are in groups of one size.

    Args:
        bits: The bits per integer, at most 8.
        values: [N, K] uint8.
        scales: [N, groups].
        zero_points: [N, groups] uint8; None if they are 2 to the power of ``bits - 1``.
    """
    held = block_bits(bits)
    if zero_points is None and bits != held:
        zero_points = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
    return BlockWeight(held, values.shape[1] // scales.shape[1], values, scales.float(), zero_points)


def block_bits(bits: int) -> Bits:
    """The bits of the smallest blocks that hold integers of some bits."""
    return 4 if bits <= 4 else 8


def ungrouped(values: Tensor, scales: Tensor, zero_points: Tensor, group_of: Tensor) -> Tensor:
    """Dequantizes a matrix whose columns are in groups in any order.

    Args:
        values: [N, K] uint8.
        scales: [N, groups].
        zero_points: [N, groups], integers.
        group_of: [K], the group of each column.

    Returns:
        [N, K] in fp32.
    """
    columns = group_of.long()
    return (values.float() - zero_points[:, columns].float()) * scales[:, columns].float()

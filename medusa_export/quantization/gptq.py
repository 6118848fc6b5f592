"""GPTQ (arXiv 2210.17323): rounds a matrix column by column, and makes up for each error in the columns that are left.

Columns are taken by the size of their inputs, the largest first. Scales and zero points are chosen before that, so
blocks stay in the order of the columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_export.models.blocks import Bits, BlockWeight

# Share of the mean of the Hessian's diagonal that is added to it, so that it can be inverted.
_DAMPING = 0.01
# Columns whose errors are collected before the rest of the matrix is changed: one product instead of many.
_COLUMNS = 64
# The shares of a block's range that are tried. A smaller range clips the largest values and rounds the others less.
_RANGES = [1 - step / 40 for step in range(21)]


def gptq(weight: Tensor, hessian: Tensor, bits: Bits, block_size: int, dtype: torch.dtype) -> BlockWeight:
    """Rounds a matrix so that its products with given inputs change little.

    Blocks of 4 bits have zero points, blocks of 8 bits have none.

    Args:
        weight: The matrix W, [N, K].
        hessian: The sum of x xᵀ over the inputs x, [K, K] in fp32.
        bits: The bits per value.
        block_size: The columns per block; it must divide K.
        dtype: The dtype of the scales.

    Returns:
        The matrix in blocks, on the CPU.
    """
    left, hessian = weight.float().clone(), hessian.clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1.0
    left[:, unused] = 0.0
    scales, zero_points = choose_ranges(left, hessian.diagonal(), bits, block_size, dtype)
    order = hessian.diagonal().argsort(descending=True)
    factors = _inverse_factors(hessian[order][:, order])
    values = _rounded(left[:, order], factors, scales.float(), zero_points, order // block_size, bits)
    in_order = torch.empty_like(values)
    in_order[:, order] = values
    return BlockWeight(
        bits, block_size, in_order.cpu(), scales.cpu(), zero_points.to(torch.uint8).cpu() if bits == 4 else None
    )


def choose_ranges(
    weight: Tensor, importance: Tensor, bits: Bits, block_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of the blocks whose rounded values have the least weighted squared error.

    Args:
        weight: The matrix, [N, K] in fp32.
        importance: The weight of each column's error, [K].
        bits: The bits per value.
        block_size: The columns per block.
        dtype: The dtype of the scales.

    Returns:
        Scales [N, K / block_size] in ``dtype``, and zero points of the same shape in fp32.
    """
    blocks = weight.view(len(weight), -1, block_size)
    weights = importance.view(1, -1, block_size)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    best = torch.full_like(low, torch.inf)
    scales, zero_points = torch.ones_like(low, dtype=dtype), torch.full_like(low, float(middle))
    for share in _RANGES:
        if bits == 4:
            scale = share * (high - low) / top
            ideal = -share * low / scale.clamp(min=1e-12)
            candidates = [(scale, ideal.floor()), (scale, ideal.ceil())]
        else:
            scale = share * torch.maximum(high, -low) / (middle - 1)
            candidates = [(scale, torch.full_like(low, float(middle)))]
        for scale, zero_point in candidates:
            kept = torch.where(scale == 0, torch.ones_like(scale), scale).to(dtype)
            zeros = zero_point.clamp(0, top).unsqueeze(-1)
            steps = kept.float().unsqueeze(-1)
            rounded = ((blocks / steps).round() + zeros).clamp(0, top)
            error = (((rounded - zeros) * steps - blocks).square() * weights).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scales = torch.where(better, kept, scales)
            zero_points = torch.where(better, zeros.squeeze(-1), zero_points)
    return scales, zero_points


def _inverse_factors(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a Hessian, [K, K]."""
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factors: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factors


def _rounded(
    left: Tensor, factors: Tensor, scales: Tensor, zero_points: Tensor, block_of: Tensor, bits: Bits
) -> Tensor:
    """Rounds columns from left to right. Each error moves the columns to its right.

    Args:
        left: The columns in the order in which they are rounded, [N, K]. They are overwritten.
        factors: The upper Cholesky factor of the inverse Hessian of these columns, [K, K].
        scales: [N, blocks] in fp32.
        zero_points: [N, blocks] in fp32.
        block_of: The block of each column, [K].
        bits: The bits per value.

    Returns:
        The values, [N, K] uint8.
    """
    columns, top = left.shape[1], (1 << bits) - 1
    values = torch.empty_like(left, dtype=torch.uint8)
    blocks = block_of.tolist()
    for first in range(0, columns, _COLUMNS):
        last = min(first + _COLUMNS, columns)
        errors = torch.empty_like(left[:, first:last])
        for column in range(first, last):
            scale, zero_point = scales[:, blocks[column]], zero_points[:, blocks[column]]
            value = ((left[:, column] / scale).round() + zero_point).clamp(0, top)
            values[:, column] = value.to(torch.uint8)
            error = (left[:, column] - (value - zero_point) * scale) / factors[column, column]
            left[:, column:last] -= error.unsqueeze(1) * factors[column, column:last]
            errors[:, column - first] = error
        left[:, last:] -= errors @ factors[first:last, last:]
    return values

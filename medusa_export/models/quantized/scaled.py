"""8-bit numbers with a scale for the whole matrix, each row, or each tile: fine-grained fp8 and compressed-tensors."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from medusa_export.models.contents import Readable


def dequantize_scaled(weight: Readable, scales: Readable) -> Tensor:
    """Multiplies a matrix by its scales.

    Args:
        weight: [N, K] in fp8.
        scales: A number, or [n, k], one for each tile of N / n rows and K / k columns. Bytes are exponents of 2, larger
            by 127.

    Returns:
        [N, K] in fp32.

    Raises:
        ValueError: The tiles do not divide the matrix.
    """
    values, factors = weight[...].float(), _numbers(scales[...])
    if factors.numel() == 1:
        return values * factors.reshape(())
    rows, columns = values.shape
    down, across = factors.shape
    if rows % down or columns % across:
        raise ValueError(f"{down} by {across} scales do not divide a matrix of {rows} by {columns}")
    tiles = values.view(down, rows // down, across, columns // across)
    return (tiles * factors.view(down, 1, across, 1)).view(rows, columns)


def scaled_reader(weight: Readable, scales: Readable) -> partial[Tensor]:
    """A function that reads a matrix and multiplies it by its scales."""
    return partial(dequantize_scaled, weight, scales)


def _numbers(scales: Tensor) -> Tensor:
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()

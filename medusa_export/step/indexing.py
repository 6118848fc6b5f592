"""Lookups by row, as one gather on a folded axis: the form that both compilers handle best."""

from __future__ import annotations

import torch
from torch import Tensor


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Looks up values[b, index[b, i]]: [B, N, ...] and [B, R] give [B, R, ...]."""
    offsets = torch.arange(values.shape[0], device=index.device) * values.shape[1]
    return values.flatten(0, 1)[index + offsets.unsqueeze(1)]


def take_entries(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Looks up values[b, rows[b, i], columns[b, i]]: [B, N, V], [B, R] or [R], and [B, R] give [B, R]."""
    return take_rows(values.flatten(1, 2), rows * values.shape[2] + columns)

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


def take_from_heads(values: Tensor, index: Tensor) -> Tensor:
    """Looks up values[b, n, index[b, i]] for each head n: [B, N, S, d] and [B, R] give [B, N, R, d]."""
    batch, heads, length, head_dim = values.shape
    head = torch.arange(batch).view(batch, 1, 1) * heads + torch.arange(heads).unsqueeze(1)  # one range for all lookups
    rows = head * length + index.unsqueeze(1)
    taken: Tensor = values.reshape(-1, head_dim)[rows]
    return taken

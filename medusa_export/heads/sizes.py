"""Sizes of dimensions that are symbols while a graph is traced."""

from __future__ import annotations

import torch

# An int, or a symbol (torch.SymInt) while a graph is traced.
Size = int


def sym_min(a: Size, b: Size) -> Size:
    """The smaller of two sizes; a symbol if one of them is."""
    size: Size = torch.sym_min(a, b)  # type: ignore[no-untyped-call]
    return size


def sym_max(a: Size, b: Size) -> Size:
    """The larger of two sizes; a symbol if one of them is."""
    size: Size = torch.sym_max(a, b)  # type: ignore[no-untyped-call]
    return size

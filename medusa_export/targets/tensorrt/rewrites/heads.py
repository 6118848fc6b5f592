"""Bring queries, keys and values into the layout of attention in one piece."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import initializer
from medusa_export.graph.rewrites.matching import constant, only_user
from medusa_export.graph.rewrites.rewrite import Rewrite

_SWAP = [0, 2, 1, 3]  # between [B, S, N, d] and [B, N, S, d]


class SplitHeadsLast(Rewrite):
    """Splits the merged product of queries, keys and values after the change of layout, not before.

    1. A ``Split`` with a ``Reshape`` and a ``Transpose`` to [B, N, S, d] behind each part becomes one ``Reshape``, one
       ``Transpose`` and a ``Split`` along the heads.

    A split with anything else behind a part (a bias, a norm of queries or keys) stays as it is.
    """

    name = "split_heads_last"

    def apply(self, model: ir.Model) -> int:
        splits = [node for node in model.graph if node.op_type == "Split" and len(node.inputs) == 2]
        return sum(_split_last(model.graph, split) for split in splits)


def _split_last(graph: ir.Graph, split: ir.Node) -> bool:
    source, sizes = split.inputs[0], constant(split.inputs[1])
    moved = [_moved(output) for output in split.outputs]
    heads = [_head_shape(transpose) for transpose in moved]
    if source is None or sizes is None or None in heads or len({shape[1] for shape in heads if shape}) != 1:
        return False
    head_dim = heads[0][1]  # type: ignore[index]
    name = split.name
    shape = initializer(graph, f"{name}/shape", np.array([0, 0, -1, head_dim], np.int64))
    counts = initializer(graph, f"{name}/heads", sizes // head_dim)
    reshape = ir.node("Reshape", [source, shape], {"allowzero": 0}, name=f"{name}/reshape")
    swap = ir.node("Transpose", [reshape.outputs[0]], {"perm": _SWAP}, name=f"{name}/transpose")
    parts = ir.node("Split", [swap.outputs[0], counts], {"axis": 1}, num_outputs=len(moved), name=f"{name}/split_heads")
    graph.insert_before(split, [reshape, swap, parts])
    for transpose, part in zip(moved, parts.outputs, strict=True):
        assert transpose is not None
        old = transpose.outputs[0]
        part.type, part.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, part)
    return True


def _moved(part: ir.Value) -> ir.Node | None:
    """The ``Transpose`` of [B, S, N, d] that is the only reader of a part's ``Reshape``."""
    reshape = only_user(part)
    if reshape is None or reshape.op_type != "Reshape":
        return None
    transpose = only_user(reshape.outputs[0])
    if transpose is None or transpose.op_type != "Transpose":
        return None
    return transpose if list(transpose.attributes["perm"].as_ints()) == _SWAP else None


def _head_shape(transpose: ir.Node | None) -> tuple[int, int] | None:
    """N and d of the tensor [B, N, S, d] that a ``Transpose`` gives."""
    shape = transpose.outputs[0].shape if transpose is not None else None
    if shape is None or len(shape) != 4:
        return None
    heads, head_dim = shape[1], shape[3]
    return (heads, head_dim) if isinstance(heads, int) and isinstance(head_dim, int) else None

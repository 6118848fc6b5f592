"""Fuse the operators of a rotary embedding."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.matching import constant, other_input, producer, replace
from medusa_export.graph.rewrites.rewrite import Rewrite


class FuseRotaryEmbedding(Rewrite):
    """Makes one ``RotaryEmbedding`` of a rotary embedding that is written out.

    1. x · cos + rotate_half(x) · sin becomes ``RotaryEmbedding``. The tables cos and sin [B, S, d] must consist of
       two equal halves; the operator reads the first half.

    Postcondition: A table that several embeddings share is split once.
    """

    name = "fuse_rotary_embedding"

    def apply(self, model: ir.Model) -> int:
        halves: dict[ir.Value, ir.Value] = {}
        count = 0
        for total in [node for node in model.graph if node.op_type == "Add"]:
            left, right = producer(total.inputs[0], "Mul"), producer(total.inputs[1], "Mul")
            if left is None or right is None:
                continue
            found = _match(left, right) or _match(right, left)
            if found is None:
                continue
            source, *tables = found
            for table in tables:
                if table not in halves:
                    halves[table] = _first_half(table)
            rotary = ir.node(
                "RotaryEmbedding",
                [source, *(halves[table] for table in tables)],
                {"interleaved": 0},
                name=f"{total.name}/rotary",
            )
            replace(total.outputs[0], [rotary])
            count += 1
        return count


def _match(plain: ir.Node, rotated: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x and the tables [B, S, d], if the nodes are x · cos and rotate_half(x) · sin."""
    for turned in rotated.inputs:
        source = _rotated_half(turned)
        if source is None or turned is None or source not in plain.inputs:
            continue
        cos, sin = _table(other_input(plain, source)), _table(other_input(rotated, turned))
        if cos is not None and sin is not None:
            return source, cos, sin
    return None


def _rotated_half(turned: ir.Value | None) -> ir.Value | None:
    """x, if a value is rotate_half(x): the negated second half of the last axis, then the first half."""
    concat = producer(turned, "Concat")
    if concat is None or len(concat.inputs) != 2:
        return None
    negated = producer(concat.inputs[0], "Neg")
    upper = producer(negated.inputs[0], "Slice") if negated else None
    lower = producer(concat.inputs[1], "Slice")
    if upper is None or lower is None or upper.inputs[0] is not lower.inputs[0]:
        return None
    source = lower.inputs[0]
    width = source.shape[-1] if source is not None and source.shape is not None else None
    if not isinstance(width, int):
        return None
    bounds = (constant(lower.inputs[2]), constant(upper.inputs[1]))
    return source if all(bound is not None and bound.tolist() == [width // 2] for bound in bounds) else None


def _table(unsqueezed: ir.Value | None) -> ir.Value | None:
    """The table [B, S, d] of two equal halves that a value [B, 1, S, d] is; None if the value is something else."""
    unsqueeze = producer(unsqueezed, "Unsqueeze")
    axes = constant(unsqueeze.inputs[1]) if unsqueeze else None
    if unsqueeze is None or axes is None or axes.tolist() != [1] or not _repeats(unsqueeze.inputs[0]):
        return None
    return unsqueeze.inputs[0]


def _repeats(table: ir.Value | None) -> bool:
    """True if a table of cosines or sines comes from angles that are concatenated with themselves."""
    while (node := producer(table, "Cos", "Sin", "Mul", "Cast")) is not None:
        table = node.inputs[0]
    concat = producer(table, "Concat")
    return concat is not None and len(concat.inputs) == 2 and concat.inputs[0] is concat.inputs[1]


def _first_half(table: ir.Value) -> ir.Value:
    """The first half of a table's last axis."""
    maker, width = table.producer(), table.shape[-1] if table.shape is not None else None
    assert maker is not None and maker.graph is not None and table.shape is not None and isinstance(width, int)
    split = ir.node("Split", [table], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{maker.name}/halves")
    maker.graph.insert_after(maker, split)
    half = split.outputs[0]
    half.type, half.shape = table.type, ir.Shape([*table.shape[:-1], width // 2])
    return half

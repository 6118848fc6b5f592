"""Read the start of a table by index."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import initializer
from medusa_export.graph.rewrites.matching import constant, holds, producer, replace
from medusa_export.graph.rewrites.rewrite import Rewrite


class LookUpPrefixes(Rewrite):
    """Makes ``Gather`` of a ``Slice`` that takes the first n rows of a table.

    1. The ``Slice`` becomes ``Gather`` by 0 … n - 1, where the graph has a ``Range`` up to n already, and n is a
       ``Min`` with a number of at most the rows of the table.
    2. The same where n is a constant.

    TensorRT's parser makes 26 layers of a slice whose end it doesn't know, and one of a gather.
    """

    name = "look_up_prefixes"

    def apply(self, model: ir.Model) -> int:
        ranges = {
            node.inputs[1]: node.outputs[0]
            for node in model.graph
            if node.op_type == "Range" and holds(node.inputs[0], 0) and holds(node.inputs[2], 1)
        }
        slices = [node for node in model.graph if node.op_type == "Slice" and len(node.inputs) >= 4]
        return sum(_look_up(model.graph, node, ranges) for node in slices)


def _look_up(graph: ir.Graph, node: ir.Node, ranges: dict[ir.Value | None, ir.Value]) -> bool:
    """Replaces one ``Slice``. ``ranges`` maps n to the numbers 0 … n - 1."""
    table, begin, end, axes = node.inputs[:4]
    axis, step = constant(axes), node.inputs[4] if len(node.inputs) == 5 else None
    if table is None or table.shape is None or axis is None or axis.size != 1:
        return False
    if not (holds(begin, 0) and (step is None or holds(step, 1))):
        return False
    rows = _rows_up_to(graph, end, table.shape[int(axis[0])], ranges)
    if rows is None:
        return False
    replace(node.outputs[0], [ir.node("Gather", [table, rows], {"axis": int(axis[0])}, name=node.name)])
    return True


def _rows_up_to(
    graph: ir.Graph, end: ir.Value | None, length: object, ranges: dict[ir.Value | None, ir.Value]
) -> ir.Value | None:
    """The numbers 0 … n - 1 of the rows before ``end``, if n is known to be at most ``length``."""
    if not isinstance(length, int):
        return None
    known = constant(end)
    if known is not None and known.size == 1:
        count = int(known[0])
        return initializer(graph, f"first_{count}", np.arange(count)) if 0 <= count <= length else None
    reshape = producer(end, "Reshape")
    limit = producer(reshape.inputs[0], "Min") if reshape else None
    if limit is None:
        return None
    bounds = [bound for value in limit.inputs if (bound := constant(value)) is not None]
    return ranges.get(limit.outputs[0]) if any(int(bound) <= length for bound in bounds) else None

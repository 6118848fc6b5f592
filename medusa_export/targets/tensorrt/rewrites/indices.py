"""Give gathers indices of 32 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import initializer
from medusa_export.graph.rewrites.rewrite import Rewrite

_OPERATORS = ("Gather", "GatherElements")


class NarrowIndices(Rewrite):
    """Gives gathers indices of 32 bits.

    1. Constant indices become int32.
    2. Other indices are cast to int32 once for all gathers that read them.

    TensorRT's parser casts 64-bit indices once per gather, unless the data have 64 bits, too.
    """

    name = "narrow_indices"

    def apply(self, model: ir.Model) -> int:
        narrow: dict[ir.Value, ir.Value] = {}
        gathers = [node for node in model.graph if node.domain == "" and node.op_type in _OPERATORS]
        return sum(_narrow(model.graph, node, narrow) for node in gathers)


def _narrow(graph: ir.Graph, gather: ir.Node, narrow: dict[ir.Value, ir.Value]) -> bool:
    """Replaces the indices of one gather. ``narrow`` maps indices of 64 bits to the same ones of 32 bits."""
    data, index = gather.inputs
    if data is None or index is None or index.dtype != ir.DataType.INT64 or data.dtype == ir.DataType.INT64:
        return False
    if data.dtype is None and index.const_value is None:
        return False
    if index not in narrow:
        narrow[index] = _in_32_bits(graph, index, gather)
    gather.replace_input_with(1, narrow[index])
    return True


def _in_32_bits(graph: ir.Graph, index: ir.Value, before: ir.Node) -> ir.Value:
    name = f"{index.name}/int32"
    if index.const_value is not None:
        return initializer(graph, name, index.const_value.numpy().astype(np.int32))
    cast = ir.node("Cast", [index], {"to": int(ir.DataType.INT32)}, name=name)
    value = cast.outputs[0]
    value.type, value.shape = ir.TensorType(ir.DataType.INT32), index.shape
    graph.insert_before(before, cast)
    return value

"""Let ONNX Runtime turn 8-bit floating-point matrices into its own while it loads a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder, initializer
from medusa_export.graph.rewrites.matching import given, replace
from medusa_export.graph.rewrites.rewrite import Rewrite


class SpellOutFloat8Weights(Rewrite):
    """Writes out how matrices of 8-bit floating-point numbers are dequantized.

    1. ``DequantizeLinear`` of such numbers with a scale per row becomes a ``Cast`` and a ``Mul``.

    ONNX Runtime computes these once, while it loads the graph. It would compute a ``DequantizeLinear`` in each step.

    Precondition: Matrices are those of ``StoreFloat8Weights``.
    """

    name = "spell_out_float8_weights"

    def apply(self, model: ir.Model) -> int:
        reads = [node for node in model.graph if node.op_type == "DequantizeLinear"]
        reads = [read for read in reads if given(read.inputs[0]).dtype == ir.DataType.FLOAT8E4M3FN]
        for read in reads:
            _spell_out(model.graph, read)
        return len(reads)


def _spell_out(graph: ir.Graph, read: ir.Node) -> None:
    values, scales = given(read.inputs[0]), given(read.inputs[1])
    assert scales.dtype is not None
    add = Builder(graph, read.name or "float8")
    numbers = add("Cast", [values], to=int(scales.dtype))
    add("Mul", [numbers, add("Unsqueeze", [scales, initializer(graph, "float8/last", np.array([-1]))])])
    replace(read.outputs[0], add.nodes)

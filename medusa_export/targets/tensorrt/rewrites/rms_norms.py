"""Write out RMS norms."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder, initializer
from medusa_export.graph.rewrites.matching import replace
from medusa_export.graph.rewrites.rewrite import Rewrite


class SpellOutRmsNorms(Rewrite):
    """Writes out RMS norms in fewer layers than TensorRT's parser does.

    1. ``RMSNormalization`` over the last axis becomes the operators that the parser makes of it, computed in fp32 as
       there, with constants of the type and rank that they meet. That is 10 layers; the parser, which casts and
       reshapes its constants, makes 13.
    """

    name = "spell_out_rms_norms"

    def apply(self, model: ir.Model) -> int:
        norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
        return sum(_spell_out(model.graph, norm) for norm in norms)


def _spell_out(graph: ir.Graph, norm: ir.Node) -> bool:
    source, weight = norm.inputs[0], norm.inputs[1]
    axis = norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1
    if source is None or weight is None or source.shape is None or source.dtype is None or axis != -1:
        return False
    rank, half = len(source.shape), source.dtype != ir.DataType.FLOAT
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    axes = initializer(graph, "last_axis", np.array([-1], np.int64))
    added = initializer(graph, f"epsilon_{epsilon:g}_{rank}", np.full([1] * rank, epsilon, np.float32))
    add = Builder(graph, norm.name or "norm")
    wide = add("Cast", [source], to=int(ir.DataType.FLOAT)) if half else source
    mean = add("ReduceMean", [add("Mul", [wide, wide]), axes], keepdims=1)
    normed = add("Div", [wide, add("Sqrt", [add("Add", [mean, added])])])
    normed = add("Cast", [normed], to=int(source.dtype)) if half else normed
    normed.type, normed.shape = source.type, source.shape
    add("Mul", [normed, weight])
    replace(norm.outputs[0], add.nodes)
    return True

"""Fuse the operators of an RMS norm."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.matching import constant, only_user, other_input, producer, replace
from medusa_export.graph.rewrites.rewrite import Rewrite


class FuseRmsNorm(Rewrite):
    """Makes one ``RMSNormalization`` of an RMS norm that is written out.

    1. x · rsqrt(mean(x²) + ε) · weight, with a weight of one axis, becomes ``RMSNormalization``.
    2. The same with a ``Cast`` of x to fp32 and a ``Cast`` back before the weight becomes one too: the operator
       computes in fp32 by itself.

    A norm that multiplies by the weight before it casts back (Gemma, OLMo 2) stays as it is, since the operator
    multiplies after the cast.

    Postcondition: No ``Reciprocal`` is left that belongs to such a norm.
    """

    name = "fuse_rms_norm"

    def apply(self, model: ir.Model) -> int:
        return sum(_fuse(node) for node in [node for node in model.graph if node.op_type == "Reciprocal"])


def _fuse(inverse: ir.Node) -> bool:
    """Replaces the norm whose ``Reciprocal`` is given; False if it is no such norm."""
    found = _mean_of_squares(inverse)
    if found is None:
        return False
    wide, epsilon = found
    scaled = only_user(inverse.outputs[0])
    if scaled is None or scaled.op_type != "Mul" or wide not in scaled.inputs:
        return False
    source, last = wide, scaled.outputs[0]
    widening = producer(wide, "Cast")
    if widening is not None:  # half precision: computed in fp32, and cast back to the type of the input
        narrowing, narrow = only_user(last), widening.inputs[0]
        if narrowing is None or narrowing.op_type != "Cast" or narrow is None or narrow.dtype is None:
            return False
        if narrowing.attributes["to"].as_int() != narrow.dtype.value:
            return False
        source, last = narrow, narrowing.outputs[0]
    weighted = only_user(last)
    weight = other_input(weighted, last) if weighted is not None and weighted.op_type == "Mul" else None
    if weighted is None or weight is None or weight.shape is None or len(weight.shape) != 1:
        return False
    attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    norm = ir.node("RMSNormalization", [source, weight], attributes, name=f"{weighted.name}/norm")
    replace(weighted.outputs[0], [norm])
    return True


def _mean_of_squares(inverse: ir.Node) -> tuple[ir.Value, float] | None:
    """x and ε, if the node is 1 / sqrt(mean(x²) + ε) over the last axis."""
    root = producer(inverse.inputs[0], "Sqrt")
    total = producer(root.inputs[0], "Add") if root else None
    if total is None:
        return None
    mean = producer(total.inputs[0], "ReduceMean") or producer(total.inputs[1], "ReduceMean")
    epsilon = constant(other_input(total, mean.outputs[0])) if mean else None
    square = producer(mean.inputs[0], "Pow") if mean else None
    if mean is None or square is None or epsilon is None or epsilon.size != 1:
        return None
    axes, exponent, source = constant(mean.inputs[1]), constant(square.inputs[1]), square.inputs[0]
    if axes is None or axes.tolist() != [-1] or exponent is None or float(exponent) != 2.0 or source is None:
        return None
    return source, float(epsilon.reshape(()))

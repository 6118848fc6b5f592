"""Multiply 8-bit integers with 8-bit integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import initializer
from medusa_export.graph.rewrites.matching import constant, given, only_user, producer, replace_value
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.constants import CONTRIB


class FuseIntegerProducts(Rewrite):
    """Makes one ``MatMulIntegerToFloat`` of a product of a rounded input and a matrix of 8-bit integers.

    1. A product of two ``DequantizeLinear``, of an input and of a matrix with one scale per column, becomes
       ``MatMulIntegerToFloat``. Sums of integers are exact, so a row has the same bits whatever its neighbours.
    2. A norm takes over the factors of the columns of its result, if that goes to such a product only.

    The count is the number of products.

    Precondition: Products are those of ``QuantizeProducts``. Norms are not fused with additions yet.
    """

    name = "fuse_integer_products"

    def apply(self, model: ir.Model) -> int:
        count = 0
        for node in [node for node in model.graph if node.op_type == "MatMul"]:
            rounded, matrix = (producer(value, "DequantizeLinear") for value in node.inputs)
            if rounded is None or matrix is None or "block_size" in matrix.attributes:
                continue
            quantize = producer(rounded.inputs[0], "QuantizeLinear")
            assert quantize is not None
            _move_factors(model.graph, quantize)
            inputs = [
                quantize.outputs[0],
                given(matrix.inputs[0]),
                given(rounded.inputs[1]),
                given(matrix.inputs[1]),
                given(rounded.inputs[2]),
            ]
            fused = ir.node("MatMulIntegerToFloat", inputs, domain=CONTRIB, name=node.name)
            model.graph.insert_before(node, fused)
            replace_value(node.outputs[0], fused.outputs[0])
            count += 1
        return count


def _move_factors(graph: ir.Graph, quantize: ir.Node) -> None:
    """Multiplies the weights of a norm by the factors of its columns, where nothing else reads its result."""
    scaled = producer(quantize.inputs[0], "Mul")
    norm = producer(scaled.inputs[0], "RMSNormalization") if scaled is not None else None
    if scaled is None or norm is None or only_user(norm.outputs[0]) is not scaled:
        return
    weight = given(norm.inputs[1]).const_value
    factors = constant(scaled.inputs[1])
    if weight is None or factors is None:
        return
    moved = initializer(graph, f"{norm.name}/scaled", (weight.numpy() * factors).astype(np.float32))
    norm.replace_input_with(1, moved)
    replace_value(scaled.outputs[0], norm.outputs[0])

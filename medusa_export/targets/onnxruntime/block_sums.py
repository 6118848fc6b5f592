"""Sum the columns of blocks without a matrix."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.block_weights import BLOCK_SUMS
from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import given, replace, shape_of
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.constants import integers


class SumBlocks(Rewrite):
    """Sums the input of a product over each block by ``ReduceSum``.

    The standard graph multiplies the input by a matrix of zeros and ones, of which ONNX Runtime reads a packed copy for
    each product.

    1. x [..., K] times a matrix that sums blocks becomes a ``Reshape`` to [..., K / block_size, block_size] and a
       ``ReduceSum``. A block is summed by itself, so its bits do not depend on the other rows.

    The count is the number of such products. Matrices without offsets have none.

    Precondition: The products are those of ``QuantizeWeights``.
    """

    name = "sum_blocks"

    def apply(self, model: ir.Model) -> int:
        found = [node for node in model.graph if node.op_type == "MatMul" and _sums_blocks(node)]
        for node in found:
            tensor, matrix = (given(value) for value in node.inputs)
            columns, blocks = shape_of(matrix).numpy()
            shape = [0] * (len(shape_of(tensor)) - 1) + [blocks, columns // blocks]
            build = Builder(model.graph)
            parts = build("Reshape", [tensor, integers(model.graph, f"blocks_{'_'.join(map(str, shape))}", shape)])
            build("ReduceSum", [parts, integers(model.graph, "within_block", [-1])], keepdims=0)
            replace(node.outputs[0], build.nodes)
        return len(found)


def _sums_blocks(product: ir.Node) -> bool:
    return (given(product.inputs[1]).name or "").startswith(f"{BLOCK_SUMS}/")

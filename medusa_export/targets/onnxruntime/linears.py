"""Read transposed weights as they are stored."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.linears import transposed_weight
from medusa_export.graph.rewrites.matching import producer, replace_value
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.constants import CONTRIB


class FuseTransposedWeights(Rewrite):
    """Makes one ``FusedMatMul`` of a product with a transposed weight.

    1. x Wᵀ becomes ``FusedMatMul``, which reads W as it is stored. W may be a ``Cast`` of the stored weight.

    Such a weight is embedding and ``lm_head`` at once, and is stored once, as rows. ONNX Runtime transposes it while it
    loads a graph if it is smaller than 1 GiB. It transposes a larger one in each step.
    """

    name = "fuse_transposed_weights"

    def apply(self, model: ir.Model) -> int:
        count = 0
        for node in [node for node in model.graph if node.op_type == "MatMul"]:
            weight = transposed_weight(node) or _transposed_cast(node)
            if weight is None:
                continue
            fused = ir.node("FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain=CONTRIB, name=node.name)
            model.graph.insert_before(node, fused)
            replace_value(node.outputs[0], fused.outputs[0])
            count += 1
        return count


def _transposed_cast(product: ir.Node) -> ir.Value | None:
    """The weight W of a product x Wᵀ, if it is a ``Cast`` of a stored weight; None otherwise."""
    transpose = producer(product.inputs[1], "Transpose")
    cast = producer(transpose.inputs[0], "Cast") if transpose is not None else None
    stored = cast.inputs[0] if cast is not None else None
    return cast.outputs[0] if cast is not None and stored is not None and stored.is_initializer() else None

"""Fuse additions into the norms that follow them."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.matching import producer, rank_of, replace_value
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.constants import CONTRIB


class FuseSkipNorms(Rewrite):
    """Makes one node of an ``Add`` and the ``RMSNormalization`` of its result.

    1. Both become ``SkipSimplifiedLayerNormalization``, which gives the sum out too. The summands must be two tensors
       [B, S, H], neither of them a constant.
    """

    name = "fuse_skip_norms"

    def apply(self, model: ir.Model) -> int:
        count = 0
        for norm in [node for node in model.graph if node.op_type == "RMSNormalization"]:
            total = producer(norm.inputs[0], "Add")
            if total is None or any(
                value is None or rank_of(value) != 3 or value.is_initializer() for value in total.inputs
            ):
                continue
            fused = ir.node(
                "SkipSimplifiedLayerNormalization",
                [*total.inputs, norm.inputs[1]],
                {"epsilon": norm.attributes["epsilon"].as_float()},
                domain=CONTRIB,
                num_outputs=4,
                name=f"{norm.name}/skip",
            )
            model.graph.insert_before(norm, fused)
            replace_value(norm.outputs[0], fused.outputs[0])
            replace_value(total.outputs[0], fused.outputs[3])
            count += 1
        return count

"""Products with transposed weights in a graph derived for ONNX Runtime.

A weight that is both embedding and ``lm_head`` is stored once, as rows. ONNX Runtime transposes such a weight while it
loads a graph, but none from 1 GiB on: a step would do it instead, as often as it runs.
"""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites import replace_value, transposed_weight
from medusa_export.targets.onnxruntime.nodes import CONTRIB


def fuse_transposed_weights(graph: ir.Graph) -> int:
    """x Wᵀ: one ``FusedMatMul``, which reads W as it is stored. Gives the number of places."""
    count = 0
    for node in [node for node in graph if node.op_type == "MatMul"]:
        weight = transposed_weight(node)
        if weight is None:
            continue
        fused = ir.node("FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain=CONTRIB, name=node.name)
        graph.insert_before(node, fused)
        replace_value(node.outputs[0], fused.outputs[0])
        count += 1
    return count

"""Replace the operator by which torch indexes rows."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.matching import constant, producer, replace
from medusa_export.graph.rewrites.rewrite import Rewrite


class GatherRows(Rewrite):
    """Makes ``Gather`` of a ``GatherND`` that picks rows.

    1. ``GatherND`` without batch axes, by indices that an ``Unsqueeze`` gives a last axis of one, becomes ``Gather``
       along the first axis. torch's indexing is exported as the former.
    """

    name = "gather_rows"

    def apply(self, model: ir.Model) -> int:
        count = 0
        for node in [node for node in model.graph if node.op_type == "GatherND"]:
            unsqueeze = producer(node.inputs[1], "Unsqueeze")
            axes = constant(unsqueeze.inputs[1]) if unsqueeze else None
            index = unsqueeze.inputs[0] if unsqueeze else None
            batched = "batch_dims" in node.attributes and node.attributes["batch_dims"].as_int() > 0
            if axes is None or index is None or index.shape is None or batched:
                continue
            if axes.tolist() in ([-1], [len(index.shape)]):
                gather = ir.node("Gather", [node.inputs[0], index], {"axis": 0}, name=f"{node.name}/rows")
                replace(node.outputs[0], [gather])
                count += 1
        return count

"""Replace the operators by which torch indexes rows."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.matching import constant, producer, replace
from medusa_export.graph.rewrites.rewrite import Rewrite


class GatherRows(Rewrite):
    """Makes one ``Gather`` of the operators that pick rows.

    1. ``GatherND`` without batch axes, by indices that an ``Unsqueeze`` gives a last axis of one, becomes ``Gather``
       along the first axis. torch's indexing is exported as the former.
    2. A ``Gather`` whose index is a list that is reshaped to a list reads the list itself. torch's ``index_select`` is
       exported with such a reshape, which is for a single number.
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
        return count + sum(_read_list(node) for node in model.graph if node.op_type == "Gather")


def _read_list(gather: ir.Node) -> bool:
    """Makes a ``Gather`` read its index without a ``Reshape`` that changes nothing."""
    reshape = producer(gather.inputs[1], "Reshape")
    index = reshape.inputs[0] if reshape else None
    shape = constant(reshape.inputs[1]) if reshape else None
    if index is None or index.shape is None or len(index.shape) != 1 or shape is None or shape.tolist() != [-1]:
        return False
    gather.replace_input_with(1, index)
    return True

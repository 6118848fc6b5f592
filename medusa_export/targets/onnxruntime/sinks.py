"""Find attention with sinks, which is of plain operators in the standard graph."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.matching import constant, only_user, producer, replace_value
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.attentions import SINK_ATTENTION, preceding


class GatherSinks(Rewrite):
    """Makes one node of an attention with sinks, for the rewrite that fuses attention.

    1. The operators of ``step.attention.attention_with_sinks``, from the queries and caches to the output, become a
       node ``SinkAttention`` with inputs and attributes of an ``Attention``, and the sinks [N] as its fifth input.

    Attention that does not read its caches as they are, or is not fp32, stays as it is.

    Postcondition: ``FuseGroupQueryAttention`` must follow. No runtime knows these nodes.
    """

    name = "gather_sinks"

    def apply(self, model: ir.Model) -> int:
        return sum(_gather(model.graph, node) for node in [node for node in model.graph if node.op_type == "MatMul"])


def _gather(graph: ir.Graph, product: ir.Node) -> bool:
    """Replaces the operators up to a product of weights and values; False if they are others."""
    division = preceding(product, "Reshape", "Div")
    shifted = preceding(division, "Exp", "Sub")
    if shifted is None or producer(product.inputs[1], "TensorScatter") is None:
        return False
    masked, highest = producer(shifted.inputs[0], "Where"), producer(shifted.inputs[1], "Max")
    hidden = producer(masked.inputs[0], "Not") if masked is not None else None
    sinks = producer(highest.inputs[1], "Reshape") if highest is not None else None
    scaled = preceding(masked, "Reshape", "Mul", place=2)
    scores = preceding(scaled, "MatMul")
    rows, keys = preceding(scores, "Reshape"), preceding(scores, "Transpose", place=1)
    output = only_user(product.outputs[0])
    if hidden is None or sinks is None or scaled is None or rows is None or keys is None or output is None:
        return False
    scale = constant(scaled.inputs[1])
    if scale is None:
        return False
    inputs = [rows.inputs[0], keys.inputs[0], product.inputs[1], hidden.inputs[0], sinks.inputs[0]]
    attributes = {"scale": float(scale), "softcap": 0.0}
    node = ir.node(SINK_ATTENTION, inputs, attributes, domain="medusa_export", name=f"{product.name}/sinks")
    graph.insert_before(output, node)
    replace_value(output.outputs[0], node.outputs[0])
    return True

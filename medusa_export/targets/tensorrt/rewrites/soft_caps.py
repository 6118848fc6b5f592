"""Write out attention with a soft cap."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder, initializer
from medusa_export.graph.rewrites.matching import replace
from medusa_export.graph.rewrites.rewrite import Rewrite


class SpellOutSoftCaps(Rewrite):
    """Writes out attention with a soft cap, which TensorRT's attention lacks.

    1. ``Attention`` with a soft cap becomes products, ``Tanh`` and ``Softmax``, computed in fp32.

    Precondition: ``FoldQueryGroups`` has run: there are as many query heads as key heads.
    """

    name = "spell_out_soft_caps"

    def apply(self, model: ir.Model) -> int:
        capped = [node for node in model.graph if node.op_type == "Attention" and _float(node, "softcap")]
        for node in capped:
            _spell_out(model.graph, node)
        return len(capped)


def _spell_out(graph: ir.Graph, node: ir.Node) -> None:
    query, key, value, mask = node.inputs[:4]
    assert query is not None and key is not None and value is not None and mask is not None
    kind, cap = key.dtype, _float(node, "softcap")
    assert kind is not None
    scale = initializer(
        graph, f"scale_{_float(node, 'scale'):g}", np.full([1] * 4, _float(node, "scale") / cap, np.float32)
    )
    cap_value = initializer(graph, f"cap_{cap:g}", np.full([1] * 4, cap, np.float32))
    lowest = initializer(graph, "lowest", np.full([1] * 4, np.finfo(np.float32).min, np.float32))
    add = Builder(graph, node.name or "attention")
    turned = add("Transpose", [key], perm=[0, 1, 3, 2])
    scores = add("Cast", [add("MatMul", [query, turned])], to=int(ir.DataType.FLOAT))
    scores = add("Mul", [add("Tanh", [add("Mul", [scores, scale])]), cap_value])
    weights = add("Softmax", [add("Where", [mask, scores, lowest])], axis=-1)
    add("MatMul", [add("Cast", [weights], to=int(kind)), value])
    replace(node.outputs[0], add.nodes)


def _float(node: ir.Node, name: str) -> float:
    """An attribute of a node; 0 if it has none."""
    return node.attributes[name].as_float() if name in node.attributes else 0.0

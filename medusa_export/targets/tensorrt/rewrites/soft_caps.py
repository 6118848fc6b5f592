"""Write out attention that TensorRT's attention can't compute."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder, initializer
from medusa_export.graph.rewrites.matching import given, replace, shape_of
from medusa_export.graph.rewrites.rewrite import Rewrite


class SpellOutSoftCaps(Rewrite):
    """Writes out attention that TensorRT's attention can't compute: it has no soft cap, and takes one size of head.

    1. ``Attention`` with a soft cap becomes products, ``Tanh`` and ``Softmax``, computed in fp32.
    2. ``Attention`` whose keys and values differ in size becomes the same without ``Tanh``.

    Precondition: ``FoldQueryGroups`` has run: there are as many query heads as key heads.
    """

    name = "spell_out_soft_caps"

    def apply(self, model: ir.Model) -> int:
        found = [
            node
            for node in model.graph
            if node.op_type == "Attention" and (_float(node, "softcap") or _sizes_differ(node))
        ]
        for node in found:
            _spell_out(model.graph, node)
        return len(found)


def _sizes_differ(node: ir.Node) -> bool:
    key, value = (given(tensor) for tensor in node.inputs[1:3])
    return shape_of(key)[3] != shape_of(value)[3]


def _spell_out(graph: ir.Graph, node: ir.Node) -> None:
    query, key, value, mask = node.inputs[:4]
    assert query is not None and key is not None and value is not None and mask is not None
    kind, cap = key.dtype, _float(node, "softcap")
    assert kind is not None and mask.dtype is not None
    factor = _float(node, "scale") / (cap or 1.0)
    scale = initializer(graph, f"scale_{factor:.9g}", np.full([1] * 4, factor, np.float32))
    lowest = initializer(graph, "lowest", np.full([1] * 4, np.finfo(np.float32).min, np.float32))
    add = Builder(graph, node.name or "attention")
    turned = add("Transpose", [key], perm=[0, 1, 3, 2])
    scores = add("Cast", [add("MatMul", [query, turned])], to=int(ir.DataType.FLOAT))
    scores = add("Mul", [scores, scale])
    if cap:
        scores = add(
            "Mul", [add("Tanh", [scores]), initializer(graph, f"cap_{cap:g}", np.full([1] * 4, cap, np.float32))]
        )
    if mask.dtype == ir.DataType.BOOL:
        scores = add("Where", [mask, scores, lowest])
    else:
        scores = add("Add", [scores, add("Cast", [mask], to=int(ir.DataType.FLOAT))])
    weights = add("Softmax", [scores], axis=-1)
    add("MatMul", [add("Cast", [weights], to=int(kind)), value])
    replace(node.outputs[0], add.nodes)


def _float(node: ir.Node, name: str) -> float:
    """An attribute of a node; 0 if it has none."""
    return node.attributes[name].as_float() if name in node.attributes else 0.0

"""Write linear layers with untransposed weights as those with transposed ones, so that their weights can be rounded."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder, register
from medusa_export.graph.rewrites.matching import given, replace
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.graph.weights import LazyWeight

_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


class TurnLinears(Rewrite):
    """Writes products x W + b as x (Wᵀ)ᵀ + b, where W is to be stored in integers or in fp8.

    1. ``Gemm`` with a weight W [K, N] becomes ``Transpose`` of Wᵀ [N, K], ``MatMul`` and ``Add``.

    GPT-2 and its relatives have such layers (transformers' ``Conv1D``). Weights that keep their dtype stay as they are.

    Precondition: Weights are those of ``StepWeights``.
    """

    name = "turn_linears"

    def apply(self, model: ir.Model) -> int:
        products = [node for node in model.graph if node.op_type == "Gemm" and self._is_stored(node)]
        for product in products:
            _turn(model.graph, product)
        return len(products)

    def _is_stored(self, product: ir.Node) -> bool:
        value = product.inputs[1]
        weight = value.const_value if value is not None else None
        if not isinstance(weight, LazyWeight) or value is None or len(value.uses()) > 1:
            return False
        types, given_attributes = self.step.weights, product.attributes
        if any(name in given_attributes and given_attributes[name].value != plain for name, plain in _PLAIN.items()):
            return False
        fits = types.bits(weight.role) is not None and types.block_for(weight.shape.numpy()[0]) is not None
        return fits or types.is_float8(weight.role)


def _turn(graph: ir.Graph, product: ir.Node) -> None:
    source, value, bias = (given(value) for value in product.inputs)
    weight = value.const_value
    assert isinstance(weight, LazyWeight)
    build = Builder(graph, product.name or "")
    transposed = build("Transpose", [register(graph, weight.transposed())], perm=[1, 0])
    build("Add", [build("MatMul", [source, transposed]), bias])
    replace(product.outputs[0], build.nodes)

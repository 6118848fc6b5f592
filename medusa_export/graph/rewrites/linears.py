"""Store the weights of linear layers as ``MatMul`` reads them, and merge layers of one input."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir
import torch

from medusa_export.graph.rewrites.building import initializer
from medusa_export.graph.rewrites.matching import producer, shape_of
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.graph.weights import LazyWeight, weight_of

_Product = tuple[ir.Node, ir.Value]


class LayOutLinears(Rewrite):
    """Stores weights transposed, and merges products x Wᵀ of one x.

    1. A weight that only one product x Wᵀ reads is stored transposed.
    2. Several such products of one x become one ``MatMul`` with the weights side by side, and a ``Split``.
    3. A weight that several products read (an ``lm_head`` that heads use too) is stored transposed, by itself.

    A weight that is read elsewhere too (tied embeddings) stays as it is.

    Precondition: Weights are those of ``StepWeights``.

    Postcondition: Weights are read and transposed when the model is written, not before. The count is the number of
    products that read a weight as it is stored.
    """

    name = "lay_out_linears"

    def apply(self, model: ir.Model) -> int:
        graph = model.graph
        count = 0
        groups: dict[ir.Value, list[_Product]] = defaultdict(list)
        for node in [node for node in graph if node.op_type == "MatMul"]:
            weight, source = transposed_weight(node), node.inputs[0]
            products = _products_of(weight) if weight is not None else []
            if weight is None or source is None:
                continue
            if products == [node]:
                groups[source].append((node, weight))
            elif products:
                turned = _transposed(graph, [weight])
                for product in products:
                    product.replace_input_with(1, turned)
                count += len(products)
        for source, members in groups.items():
            _merge(graph, source, members)
            count += len(members)
        return count


def _merge(graph: ir.Graph, source: ir.Value, members: list[_Product]) -> None:
    """Replaces the products of one input by one product, and a ``Split`` if there are several."""
    weights = [weight for _, weight in members]
    merged = _transposed(graph, weights)
    first = members[0][0]
    if len(members) == 1:
        first.replace_input_with(1, merged)
        return
    product = ir.node("MatMul", [source, merged], name=f"{first.name}/merged")
    sizes = initializer(
        graph, f"{first.name}/sizes", np.array([shape_of(weight)[0] for weight in weights], dtype=np.int64)
    )
    split = ir.node(
        "Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=len(members), name=f"{first.name}/split"
    )
    graph.insert_before(first, [product, split])
    for (node, _), output in zip(members, split.outputs, strict=True):
        old = node.outputs[0]
        output.type, output.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, output)


def transposed_weight(product: ir.Node) -> ir.Value | None:
    """The weight W of a product that is written as x Wᵀ; None for any other product."""
    transpose = producer(product.inputs[1], "Transpose")
    weight = transpose.inputs[0] if transpose is not None else None
    return weight if weight is not None and weight.is_initializer() else None


def _products_of(weight: ir.Value) -> list[ir.Node]:
    """The products x Wᵀ of a weight; an empty list if anything else reads the weight."""
    products: list[ir.Node] = []
    for use in weight.uses():
        readers = list(use.node.outputs[0].uses()) if use.node.op_type == "Transpose" else []
        if not readers or any(reader.node.op_type != "MatMul" or reader.idx != 1 for reader in readers):
            return []
        products += [reader.node for reader in readers]
    return products


def _transposed(graph: ir.Graph, weights: list[ir.Value]) -> ir.Value:
    """An initializer of the weights' transposes side by side. Its values are computed when the model is written."""
    name = "+".join(weight.name or "" for weight in weights) + ".T"
    sources = [weight_of(weight) for weight in weights]
    shapes = [source.shape.numpy() for source in sources]
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]

    def turned() -> torch.Tensor:
        parts = [source.read() for source in sources]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).T

    tensor = LazyWeight(name, turned, (columns, rows), sources[0].torch_dtype)
    value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value

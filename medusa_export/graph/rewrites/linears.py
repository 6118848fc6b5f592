"""Store the weights of linear layers as ``MatMul`` reads them, and merge layers of one input."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir
import torch

from medusa_export.graph.rewrites.building import initializer, register
from medusa_export.graph.rewrites.matching import producer
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.graph.weights import LazyWeight, weight_of
from medusa_export.models.packed import joined_blocks

_Product = tuple[ir.Node, ir.Value]


class MergeLinears(Rewrite):
    """Merges products x Wᵀ of one x.

    1. Several such products become one product with the weights side by side, and a ``Split``.

    Weights that their file holds in integers of other bits are not merged, as the integers are stored as they are.
    A weight that is read elsewhere too (an ``lm_head`` that heads use, tied embeddings) stays as it is. The count is
    the number of products that were merged.
    """

    name = "merge_linears"

    def apply(self, model: ir.Model) -> int:
        groups: dict[tuple[ir.Value, int | None], list[_Product]] = defaultdict(list)
        for node in [node for node in model.graph if node.op_type == "MatMul"]:
            weight, source = transposed_weight(node), node.inputs[0]
            if weight is not None and source is not None and _products_of(weight) == [node]:
                stored = weight_of(weight).blocks
                groups[source, None if stored is None else stored.bits].append((node, weight))
        merged = [(source, members) for (source, _), members in groups.items() if len(members) > 1]
        for source, members in merged:
            _merge(model.graph, source, members)
        return sum(len(members) for _, members in merged)


class LayOutLinears(Rewrite):
    """Stores weights transposed, as ``MatMul`` reads them.

    1. A weight that only products x Wᵀ read is stored transposed.

    A weight that is read elsewhere too (tied embeddings) stays as it is.

    Precondition: Weights are those of ``StepWeights``.

    Postcondition: Weights are read and transposed when the model is written, not before. The count is the number of
    products that read a weight as it is stored.
    """

    name = "lay_out_linears"

    def apply(self, model: ir.Model) -> int:
        graph = model.graph
        count = 0
        for weight in list(graph.initializers.values()):
            products = _products_of(weight)
            if not products:
                continue
            stored = register(graph, weight_of(weight).transposed())
            for product in products:
                product.replace_input_with(1, stored)
            count += len(products)
        return count


def _merge(graph: ir.Graph, source: ir.Value, members: list[_Product]) -> None:
    """Replaces several products of one input by one product and a ``Split``."""
    parts = [weight_of(weight) for _, weight in members]
    sizes = [part.shape.numpy()[0] for part in parts]
    columns = parts[0].shape.numpy()[1]
    merged = LazyWeight(
        "+".join(part.name or "" for part in parts),
        lambda: torch.cat([part.read() for part in parts]),
        (sum(sizes), columns),
        parts[0].torch_dtype,
        parts[0].role,
        blocks=joined_blocks([part.blocks for part in parts]),
    )
    first = members[0][0]
    transpose = ir.node("Transpose", [register(graph, merged)], {"perm": [1, 0]}, name=f"{first.name}/transpose")
    product = ir.node("MatMul", [source, transpose.outputs[0]], name=f"{first.name}/merged")
    lengths = initializer(graph, f"{first.name}/sizes", np.array(sizes, dtype=np.int64))
    split = ir.node(
        "Split", [product.outputs[0], lengths], {"axis": -1}, num_outputs=len(members), name=f"{first.name}/split"
    )
    graph.insert_before(first, [transpose, product, split])
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

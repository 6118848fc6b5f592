"""Leave out the products of heads that a step does not draft with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import given, graph_input, producer, replace
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.graph.weights import PREFIX
from medusa_export.targets.onnxruntime.constants import initializer, integers


class SkipUnusedHeads(Rewrite):
    """Gives no rows to products of heads that a step does not draft with, so that their matrices are not read.

    1. A product with a stack of matrices [K, C, N], one for each head, becomes K products and a ``Concat``.
    2. A step of S tokens reads nothing of the heads behind the first S - 1. Of K products that a ``Concat`` stacks, the
       first S - 1 get their rows, the others get none. The places of those hold zeros.

    The count is the number of stacks. Stacks of matrices whose types have operators of their own stay as they are.

    Precondition: ``FuseBlockWeights`` has run. A weight of heads of three axes has one matrix for each head.
    """

    name = "skip_unused_heads"

    def apply(self, model: ir.Model) -> int:
        graph = model.graph
        for product in [node for node in graph if _multiplies_with_stack(node)]:
            _unstack(graph, product)
        stacks = [(node, products) for node in graph if (products := _stacked_products(node))]
        counts = {len(products): _step_counts(graph, len(products)) for _, products in stacks}
        for stack, products in stacks:
            _leave_out(graph, stack, products, counts[len(products)])
        return len(stacks)


class _StepCounts(NamedTuple):
    """Numbers of a step that its number of tokens decides.

    Attributes:
        matrices: [K + 1], 1 for each head that drafts and 0 for each other head; then the number of other heads.
        padding: [6], the pads of a ``Pad`` that adds zeros for the other heads at the end of the first of three axes.
    """

    matrices: ir.Value
    padding: ir.Value


def _step_counts(graph: ir.Graph, heads: int) -> _StepCounts:
    """Looks up the numbers of a step, at the start of the graph."""
    active = np.arange(heads + 2)[:, None] - 1  # by number of tokens
    unused = heads - np.maximum(active, 0)
    matrices = np.hstack([np.arange(heads) < active, unused]).astype(np.int64)
    padding = unused * np.array([0, 0, 0, 1, 0, 0])
    build = Builder(graph)
    tokens = build("Squeeze", [build("Shape", [graph_input(graph, "input_ids")], start=1, end=2)])
    place = build("Min", [tokens, integers(graph, f"tokens_for_{heads}_heads", heads + 1)])
    counts = _StepCounts(
        *(
            build("Gather", [initializer(graph, f"{name}_of_{heads}_heads", table), place], axis=0)
            for name, table in (("matrices", matrices), ("padding", padding))
        )
    )
    graph.insert_before(graph[0], build.nodes)
    return counts


def _is_of_heads(weight: ir.Value | None) -> bool:
    return weight is not None and weight.is_initializer() and (weight.name or "").startswith(f"{PREFIX}heads.")


def _multiplies_with_stack(node: ir.Node) -> bool:
    """True for a product with a stored stack of matrices of heads."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    stored = weight.const_value if weight is not None and _is_of_heads(weight) else None
    return isinstance(stored, ir.ExternalTensor) and len(stored.shape) == 3


def _unstack(graph: ir.Graph, product: ir.Node) -> None:
    """Replaces a product with a stack of matrices by one product for each, and a ``Concat``."""
    source, matrices = given(product.inputs[0]), _matrices(graph, given(product.inputs[1]))
    build = Builder(graph, product.name or "")
    whole = build("Expand", [source, integers(graph, f"{len(matrices)}_heads", [len(matrices), 1, 1])])
    parts = ir.node("Split", [whole], {"axis": 0, "num_outputs": len(matrices)}, num_outputs=len(matrices))
    build.nodes.append(parts)
    products = [build("MatMul", pair) for pair in zip(parts.outputs, matrices, strict=True)]
    build("Concat", products, axis=0)
    replace(product.outputs[0], build.nodes)


def _matrices(graph: ir.Graph, stack: ir.Value) -> list[ir.Value]:
    """The matrices of a stack, as initializers with the same bytes of the file of weights."""
    stored = stack.const_value
    assert isinstance(stored, ir.ExternalTensor)
    assert stored.offset is not None
    count, *shape = stored.shape.numpy()
    size = stored.nbytes // count
    found = []
    for index in range(count):
        name = f"{stack.name}[{index}]"
        part = ir.ExternalTensor(
            stored.location,
            stored.offset + index * size,
            size,
            stored.dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=stored.base_dir,
        )
        found.append(ir.Value(name=name, const_value=part, shape=ir.Shape(shape), type=ir.TensorType(part.dtype)))
        graph.register_initializer(found[-1])
    return found


def _stacked_products(stack: ir.Node) -> list[ir.Node]:
    """The products with matrices of heads that a ``Concat`` stacks; an empty list if it stacks anything else."""
    if stack.op_type != "Concat" or stack.attributes["axis"].as_int() != 0:
        return []
    products = [node for value in stack.inputs if value is not None and (node := value.producer()) is not None]
    matched = all(node.op_type in ("MatMul", "MatMulNBits") and _is_of_heads(node.inputs[1]) for node in products)
    return products if matched and 1 < len(products) == len(stack.inputs) else []


def _leave_out(graph: ir.Graph, stack: ir.Node, products: Sequence[ir.Node], counts: _StepCounts) -> None:
    """Gives no rows to the products of heads that do not draft."""
    source = given(products[0].inputs[0])
    split = producer(source, "Split")
    build = Builder(graph, f"{stack.name}/rows")
    if split is not None:
        whole = given(split.inputs[0])
    else:
        whole = build("Expand", [source, integers(graph, f"{len(products)}_heads", [len(products), 1, 1])])
    parts = ir.node("Split", [whole, counts.matrices], {"axis": 0}, num_outputs=len(products) + 1)
    graph.insert_before(products[0], [*build.nodes, parts])
    for product, part in zip(products, parts.outputs, strict=False):
        product.replace_input_with(0, part)
    build = Builder(graph, f"{stack.name}/places")
    build("Pad", [build("Concat", stack.inputs, axis=0), counts.padding])
    replace(stack.outputs[0], build.nodes)

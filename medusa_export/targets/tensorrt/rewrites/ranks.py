"""Give constants and values the rank of the values that they meet."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import initializer
from medusa_export.graph.rewrites.rewrite import Rewrite

_ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Min", "Max", "Where", "And", "Or"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
)


class RaiseRanks(Rewrite):
    """Gives values the rank of those that they meet.

    1. A value of free size that meets one of a higher rank gets axes in front by ``Unsqueeze``.

    TensorRT's parser reads its shape at run time and reshapes it, in 5 layers.
    """

    name = "raise_ranks"

    def apply(self, model: ir.Model) -> int:
        raised: dict[tuple[ir.Value, int], ir.Value] = {}
        nodes = [node for node in model.graph if node.domain == "" and node.op_type in (*_ELEMENTWISE, "MatMul")]
        return sum(_raise_inputs(model.graph, node, raised) for node in nodes)


def _raise_inputs(graph: ir.Graph, node: ir.Node, raised: dict[tuple[ir.Value, int], ir.Value]) -> int:
    """Raises the inputs of one node; returns their number. ``raised`` holds values by their source and rank."""
    shapes = [value.shape for value in node.inputs if value is not None and value.shape is not None]
    if len(shapes) < len(node.inputs):
        return 0
    rank, count = max(map(len, shapes)), 0
    for index, (value, shape) in enumerate(zip(node.inputs, shapes, strict=True)):
        missing = rank - len(shape)
        if value is None or missing == 0 or all(isinstance(size, int) for size in shape):
            continue
        if node.op_type == "MatMul" and len(shape) < 2:
            continue
        if (value, rank) not in raised:
            raised[value, rank] = _raised(graph, value, missing, node)
        node.replace_input_with(index, raised[value, rank])
        count += 1
    return count


def _raised(graph: ir.Graph, value: ir.Value, missing: int, before: ir.Node) -> ir.Value:
    axes = initializer(graph, f"first_{missing}_axes", np.arange(missing))
    unsqueeze = ir.node("Unsqueeze", [value, axes], name=f"{value.name}/{missing}_axes_more")
    graph.insert_before(before, unsqueeze)
    result = unsqueeze.outputs[0]
    assert value.shape is not None
    result.type, result.shape = value.type, ir.Shape([1] * missing + list(value.shape))
    return result


class BroadcastConstants(Rewrite):
    """Gives constants the rank of the values that they meet, so that TensorRT's parser need not reshape them.

    1. A number becomes another constant for each rank that it meets.
    2. A weight that only ``Mul`` and ``Add``, or only ``MatMul``, read gets dimensions of 1 in front, such as
       [1, 1, H]. If it meets values of several ranks, it gets the lowest: more would change the shape of results.
    """

    name = "broadcast_constants"

    def apply(self, model: ir.Model) -> int:
        return sum(_broadcast(model.graph, value) for value in list(model.graph.initializers.values()))


def _broadcast(graph: ir.Graph, value: ir.Value) -> int:
    """Gives one constant the ranks that it meets; returns the number of changes."""
    uses = list(value.uses())
    kinds = {use.node.op_type for use in uses}
    matrix = kinds == {"MatMul"} and len(value.shape or ()) >= 2
    if value.const_value is not None and value.const_value.size == 1:
        meets = [(use.node, use.idx) for use in uses if use.node.op_type in _ELEMENTWISE]
        return sum(_give_rank(graph, value, node, index) for node, index in meets)
    if uses and (matrix or kinds <= {"Mul", "Add"}):
        ranks = [_ranks_beside(value, use.node) for use in uses]
        return int(all(ranks) and _raise_rank(value, min(map(min, ranks))))
    return 0


def _ranks_beside(value: ir.Value, node: ir.Node) -> list[int]:
    """The ranks of a node's other inputs; an empty list if one of them is not known."""
    others = [other for other in node.inputs if other is not value and other is not None]
    ranks = [len(other.shape) for other in others if other.shape is not None]
    return ranks if len(ranks) == len(others) else []


def _give_rank(graph: ir.Graph, number: ir.Value, node: ir.Node, index: int) -> bool:
    """Replaces input ``index`` of a node by a number of the same rank as its widest other input."""
    rank = max(_ranks_beside(number, node), default=0)
    if number.const_value is None or rank <= len(number.const_value.shape):
        return False
    array = number.const_value.numpy().reshape([1] * rank)
    node.replace_input_with(index, initializer(graph, f"{number.name}/rank_{rank}", array))
    return True


def _raise_rank(value: ir.Value, rank: int) -> bool:
    """Adds dimensions of 1 in front of a constant's shape. Its data are not copied."""
    tensor = value.const_value
    if tensor is None or value.is_graph_output() or len(tensor.shape) >= rank:
        return False
    shape = ir.Shape([1] * (rank - len(tensor.shape)) + list(tensor.shape.numpy()))
    if isinstance(tensor, ir.ExternalTensor):
        value.const_value = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=shape, name=tensor.name,
            base_dir=tensor.base_dir,
        )  # fmt: skip
    else:
        value.const_value = ir.Tensor(
            tensor.numpy().reshape(shape.numpy()), dtype=tensor.dtype, shape=shape, name=tensor.name
        )
    value.shape = shape
    return True

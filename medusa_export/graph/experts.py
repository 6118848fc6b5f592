"""Replace each mark of experts by products with the matrices of single experts.

The rows of all experts come in one tensor, grouped by expert. A ``Split`` with the number of rows of each expert takes
them apart, one product x Wᵀ per expert follows, and a ``Concat``. An expert that no token chose has no rows. Its
product then costs its call only, and reads no weights. So a step reads the weights of the chosen experts, once.

Matrices are initializers of their own. So they are quantized, laid out and stored as those of linear layers, and blocks
of integers of their files are kept.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
from torch import Tensor

from medusa_export.common.errors import ExportError
from medusa_export.graph.last_made import LastMade
from medusa_export.graph.rewrites.building import Builder, register
from medusa_export.graph.rewrites.matching import given, replace
from medusa_export.graph.translations import EXPERTS_MARK, MARK_DOMAIN
from medusa_export.graph.weights import LazyWeight


def expand_experts(model: ir.Model) -> int:
    """Replaces all marks of experts.

    Args:
        model: The graph, with the weights of ``StepWeights``. It is changed in place.

    Returns:
        The number of marks.

    Raises:
        ExportError: The weights of experts are computed, and so can't be taken apart.
    """
    last = LastMade[Tensor]()
    marks = [node for node in model.graph if node.domain == MARK_DOMAIN and node.op_type == EXPERTS_MARK]
    for mark in marks:
        _expand(model.graph, mark, last)
    return len(marks)


def _expand(graph: ir.Graph, mark: ir.Node, last: LastMade[Tensor]) -> None:
    rows, stacked, counts = (given(value) for value in mark.inputs)
    stack, shape = _stored(stacked), stacked.shape
    if stack is None or shape is None:
        raise ExportError(f"The weights of experts at {mark.name} are computed, not stored: they can't be exported.")
    matrices = _matrices(stack, shape.numpy(), last, transposed=bool(mark.attributes["transposed"].as_int()))
    build = Builder(graph, mark.name or "")
    split = ir.node("Split", [rows, counts], {"axis": 0}, num_outputs=len(matrices), name=f"{mark.name}/split")
    build.nodes.append(split)
    products = []
    for group, matrix in zip(split.outputs, matrices, strict=True):
        turned = build("Transpose", [register(graph, matrix)], perm=[1, 0])
        products.append(build("MatMul", [group, turned]))
    build("Concat", products, axis=0)
    replace(mark.outputs[0], build.nodes)


def _stored(stacked: ir.Value) -> LazyWeight | None:
    """The stored weight that a stack is made of: the stack itself, or a matrix with the rows of all experts."""
    node = stacked.producer()
    value = node.inputs[0] if node is not None and node.op_type == "Reshape" else stacked
    stored = None if value is None else value.const_value
    return stored if isinstance(stored, LazyWeight) else None


def _matrices(
    stack: LazyWeight, shape: tuple[int, ...], last: LastMade[Tensor], *, transposed: bool
) -> list[LazyWeight]:
    """The matrices [N, K] of a stack, as weights of their own.

    A matrix has the name of its stack and its place. For one that is stored as [K, N], the place is in brackets, as in
    other stacks of such matrices. If the stack is stored as one matrix, the place names the number of experts, too.

    Args:
        stack: The stored weight.
        shape: The shape of the stack, [E, N, K] or [E, K, N].
        last: Keeps the stack that was read last.
        transposed: True if matrices are stored as [K, N].
    """
    count, rows, columns = shape
    if transposed:
        rows, columns = columns, rows
    of = "" if len(stack.shape) == len(shape) else f"of{count}"

    def read(index: int) -> Tensor:
        matrix = last.get(id(stack), stack.read).view(shape)[index]
        return matrix.T if transposed else matrix

    return [
        LazyWeight(
            f"{stack.name}[{index}{of}]" if transposed else f"{stack.name}.{index}{of}",
            partial(read, index),
            (rows, columns),
            stack.torch_dtype,
            stack.role,
            blocks=stack.parts[index] if stack.parts and not transposed else None,
        )
        for index in range(count)
    ]

"""Replace the mark of sampling by the traced computation.

Sampling depends only on a model's vocabulary size and type. So it is traced apart from the model, with two free sizes,
and once per process for each vocabulary size and type.
"""

from __future__ import annotations

import functools
import itertools

import onnx_ir as ir
import torch
from torch import Tensor, nn

from medusa_export.common.errors import ExportError
from medusa_export.compat.torch import export_program, quiet_tracing
from medusa_export.graph.trace import example_sampling, free_sizes, simplify, translate
from medusa_export.graph.translations import MARK_DOMAIN
from medusa_export.step.sampling import SamplingInputs, draw


class _Drawings(nn.Module):
    """``draw`` with its tensors as positional arguments."""

    def forward(
        self, logits: Tensor, nodes: Tensor, parents: Tensor, ancestors: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        return draw(logits, nodes, parents, ancestors, SamplingInputs.of(given)).tensors()


@functools.cache
def _traced(vocab_size: int, dtype: torch.dtype) -> ir.Graph:
    unused = (size for size in range(3, 100, 2) if size != vocab_size)
    batch, size, edits = itertools.islice(unused, 3)
    given = example_sampling({"batch": batch, "draws": size, "edits": edits, "masks": size}, vocab_size)
    example = (  # the tracer tells inputs apart by identity, so no tensor may appear twice
        torch.zeros(batch, size, vocab_size, dtype=dtype),
        torch.zeros(batch, size, dtype=torch.int64),
        torch.zeros(size, dtype=torch.int64),
        torch.zeros(1, size, size),
        *given.values(),
    )
    dynamic = torch.export.Dim.DYNAMIC
    rows, grid = {0: dynamic}, {0: dynamic, 1: dynamic}
    free = (grid, grid, rows, {1: dynamic, 2: dynamic}, tuple(free_sizes(vocab_size).values()))
    with torch.no_grad(), quiet_tracing():
        program = export_program(_Drawings(), example, {}, free)
        model = translate(program)
    simplify(model)
    for node in model.graph:
        node.name = f"sampling/{node.name}"
        for value in node.outputs:
            value.name = f"sampling/{value.name}"
            if value.shape is not None:  # names of free sizes are known in this graph only
                value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])
    return model.graph


def expand_sampling(model: ir.Model, dtype: torch.dtype) -> None:
    """Replaces the mark ``DrawNodes``, if the graph has one.

    Args:
        model: The traced graph. It is changed in place.
        dtype: The type of its logits.

    Raises:
        ExportError: The size of the vocabulary isn't known.
    """
    for mark in [node for node in model.graph if node.domain == MARK_DOMAIN and node.op_type == "DrawNodes"]:
        logits = mark.inputs[0]
        vocab_size = logits.shape[2] if logits is not None and logits.shape is not None else None
        if not isinstance(vocab_size, int):
            raise ExportError("The size of the vocabulary got lost while the model was traced.")
        _splice(model.graph, mark, _traced(vocab_size, dtype).clone())


def _splice(graph: ir.Graph, mark: ir.Node, part: ir.Graph) -> None:
    """Moves all nodes of ``part`` to a mark, and removes the mark."""
    inputs = [value for value in mark.inputs if value is not None]
    for value, instead in zip(part.inputs, inputs, strict=True):
        ir.convenience.replace_all_uses_with(value, instead)
    for name, value in list(part.initializers.items()):
        del part.initializers[name]
        value.name = f"sampling/{name}"
        graph.register_initializer(value)
    nodes = list(part)
    results = list(part.outputs)
    part.outputs.clear()
    part.remove(nodes)
    ir.convenience.replace_nodes_and_values(graph, mark, [mark], nodes, mark.outputs, results)

"""Small functions for making nodes and constants of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Builder:
    """Makes nodes of one output each. The caller inserts ``nodes`` into the graph.

    Args:
        graph: The graph that the nodes are for.
        prefix: Start of the nodes' names; onnx_ir names them if it is empty.

    Attributes:
        nodes: The nodes made so far, in order.
    """

    def __init__(self, graph: ir.Graph, prefix: str = "") -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self._prefix = prefix

    def __call__(
        self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        name = f"{self._prefix}/{op_type}{len(self.nodes)}" if self._prefix else None
        node = ir.node(op_type, inputs, attributes, domain=domain, name=name)
        self.nodes.append(node)
        return node.outputs[0]


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Makes a tensor an initializer of a graph, by its name."""
    value = ir.Value(
        name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant of a graph by its name; it is made where the graph has none of that name."""
    if name not in graph.initializers:
        register(graph, ir.tensor(array, name=name))
    return graph.initializers[name]

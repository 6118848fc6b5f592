"""Making nodes and constants of a graph derived for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

IR_VERSION = 11
CONTRIB = "com.microsoft"
PATH = "accepted_path"


class Builder:
    """Makes nodes of one output each; whoever uses it puts ``nodes`` in their place."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []

    def __call__(
        self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, domain=domain)
        self.nodes.append(node)
        return node.outputs[0]


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer, shared by name."""
    name = f"onnxruntime/{name}"
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
    return graph.initializers[name]


def integers(graph: ir.Graph, name: str, values: int | list[int]) -> ir.Value:
    """Integers as an initializer, shared by name."""
    return initializer(graph, name, np.array(values, dtype=np.int64))


def value_named(graph: ir.Graph, name: str) -> ir.Value:
    """A value that a node of the graph computes, by name."""
    return next(value for node in graph for value in node.outputs if value.name == name)


def given(value: ir.Value | None) -> ir.Value:
    """A value that is known to be there."""
    assert value is not None
    return value


def shape_of(value: ir.Value) -> ir.Shape:
    """A shape that is known to be known."""
    assert value.shape is not None
    return value.shape


def rank_of(value: ir.Value) -> int | None:
    """How many axes a value has, if that is known."""
    return len(value.shape) if value.shape is not None else None

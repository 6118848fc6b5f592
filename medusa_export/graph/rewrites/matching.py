"""Small functions for finding and replacing parts of a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.common.tuning import LARGEST_INSPECTED


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes a value, if it is a standard operator of one of these types."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The values of a small constant; None if the value is not constant, or large."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None and tensor.size <= LARGEST_INSPECTED else None


def holds(value: ir.Value | None, number: int) -> bool:
    """True if a value is a constant that holds this number only."""
    known = constant(value)
    return known is not None and known.size == 1 and int(known.reshape(())) == number


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value; None if there are several, or if the value is an output of the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other input of a node of two inputs."""
    first, second = node.inputs
    return second if first is value else first


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Gives a value the name, the type and the readers of another."""
    new.type, new.shape = old.type, old.shape
    name, old.name = old.name, f"{old.name}/replaced"
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.name = name


def replace(old: ir.Value, nodes: list[ir.Node]) -> None:
    """Inserts nodes where a value is computed; the first output of the last node replaces the value."""
    maker = old.producer()
    assert maker is not None and maker.graph is not None
    maker.graph.insert_before(maker, nodes)
    replace_value(old, nodes[-1].outputs[0])


def graph_input(graph: ir.Graph, name: str) -> ir.Value:
    """An input of a graph, by name."""
    return next(value for value in graph.inputs if value.name == name)


def has_input(graph: ir.Graph, name: str) -> bool:
    """True if a graph has an input of a name."""
    return any(value.name == name for value in graph.inputs)


def value_named(graph: ir.Graph, name: str) -> ir.Value:
    """A value that a node of the graph computes, by name."""
    return next(value for node in graph for value in node.outputs if value.name == name)


def given(value: ir.Value | None) -> ir.Value:
    """An input of a node that is known to be present."""
    assert value is not None
    return value


def shape_of(value: ir.Value) -> ir.Shape:
    """The shape of a value whose shape is known."""
    assert value.shape is not None
    return value.shape


def rank_of(value: ir.Value) -> int | None:
    """The number of axes of a value; None if its shape is not known."""
    return len(value.shape) if value.shape is not None else None

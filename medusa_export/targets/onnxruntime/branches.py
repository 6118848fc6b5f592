"""Move a part of a graph into a branch of an ``If``, beside a shorter branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import graph_input
from medusa_export.targets.onnxruntime.constants import integers

_SCALAR_ONE = "scalar_one"


def is_plain_step(graph: ir.Graph) -> ir.Value:
    """A boolean that says whether a step has one token; computed at the start of the graph."""
    one = integers(graph, _SCALAR_ONE, 1)
    known = next((use.node.outputs[0] for use in one.uses() if use.node.op_type == "Equal"), None)
    if known is not None:
        return known
    head = Builder(graph)
    size = head("Squeeze", [head("Shape", [graph_input(graph, "input_ids")], start=1, end=2)])
    plain = head("Equal", [size, one])
    graph.insert_before(graph[0], head.nodes)
    return plain


def branch(
    graph: ir.Graph,
    name: str,
    condition: ir.Value,
    results: Mapping[str, ir.Value],
    short: Mapping[str, ir.Value],
    short_nodes: Sequence[ir.Node],
    *,
    outside: ir.Value | None = None,
) -> ir.Graph:
    """Moves the nodes that only ``results`` need into a branch of an ``If``.

    Args:
        graph: The graph.
        name: The name of the branch.
        condition: A boolean; if it is true, the short branch runs.
        results: Values of the graph, by any names.
        short: Their values in the short branch, by the same names.
        short_nodes: The nodes that compute ``short``.
        outside: A value that stays out of the branch, with all that it is computed from.

    Returns:
        The long branch, with the nodes that were moved.
    """
    tail = _tail(graph, set(results.values()), outside)
    step = ir.node("If", [condition], num_outputs=len(results), name=name)
    graph.insert_after(tail[-1], step)
    for (key, old), new in zip(results.items(), step.outputs, strict=True):
        readers = [(use.node, use.idx) for use in old.uses() if use.node not in tail]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{name}/{key}"
        simple = short[key]
        simple.name, simple.type, simple.shape = f"plain/{key}", old.type, old.shape
        for reader, index in readers:
            reader.replace_input_with(index, new)
        if old.is_graph_output():
            graph.outputs[graph.outputs.index(old)] = new
    graph.remove(tail)
    branches = {
        "then_branch": ir.Graph([], [short[key] for key in results], nodes=short_nodes, name="plain"),
        "else_branch": ir.Graph([], list(results.values()), nodes=tail, name=name),
    }
    for attribute, part in branches.items():
        step.attributes[attribute] = ir.AttrGraph(attribute, part)
    return branches["else_branch"]


def _tail(graph: ir.Graph, results: set[ir.Value], outside: ir.Value | None) -> list[ir.Node]:
    """The nodes that only ``results`` need, in order, without ``outside`` and the nodes that it is computed from."""
    tail: list[ir.Node] = []
    inside: set[ir.Node] = set()
    for node in reversed(list(graph)):
        values = [value for value in node.outputs if value not in results]
        if outside in values or any(value.is_graph_output() for value in values):
            continue
        readers = [use.node for value in values for use in value.uses()]
        if (readers or len(values) < len(node.outputs)) and all(reader in inside for reader in readers):
            inside.add(node)
            tail.append(node)
    return tail[::-1]

"""Cache updates that write the new entries of a step, without the pending ones."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import graph_input, producer
from medusa_export.targets.onnxruntime.constants import integers


def first_new_slots(graph: ir.Graph, margin: int) -> ir.Value:
    """[B], the slot of each row's first new entry, computed at the start of the graph. ``margin`` is M."""
    head = Builder(graph)
    slots = head("Add", [graph_input(graph, "cache_lengths"), integers(graph, "margin", [margin])])
    graph.insert_before(graph[0], head.nodes)
    return slots


def write_new_entries_only(cache: ir.Value, margin: int, slots: ir.Value) -> None:
    """Makes the ``TensorScatter`` of a cache write new entries only. Layers may share a cache: it is done once.

    Args:
        cache: The cache that it gives.
        margin: M. Without a margin there are no pending entries.
        slots: [B], where the new entries begin.
    """
    scatter = producer(cache, "TensorScatter")
    assert scatter is not None
    if margin and scatter.inputs[2] is not slots:
        concat = producer(scatter.inputs[1], "Concat")
        assert concat is not None
        scatter.replace_input_with(1, concat.inputs[1])
        scatter.replace_input_with(2, slots)

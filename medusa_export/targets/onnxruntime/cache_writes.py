"""Cache updates that write the new entries of a step, without the pending ones."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import graph_input, producer
from medusa_export.graph.rewrites.rewrite import Rewrite
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
        cache: The updated cache, the output of the ``TensorScatter``.
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


class WriteNewEntriesOnly(Rewrite):
    """Makes all updates of caches write the new entries of a step, without the pending ones.

    1. ``TensorScatter`` writes new entries only, behind the others of their row.

    It is for attention that no other rewrite replaces: that of plain operators, as with sinks.

    Postcondition: Entries of accepted nodes are no longer written. ``ReplacePendingEntries`` must follow, if M > 0.
    """

    name = "write_new_entries_only"

    def apply(self, model: ir.Model) -> int:
        caches = [node.outputs[0] for node in model.graph if node.op_type == "TensorScatter"]
        left = [cache for cache in caches if _writes_pending_entries(cache)] if self.step.margin else []
        if left:
            slots = first_new_slots(model.graph, self.step.margin)
            for cache in left:
                write_new_entries_only(cache, self.step.margin, slots)
        return len(left)


def _writes_pending_entries(cache: ir.Value) -> bool:
    scatter = producer(cache, "TensorScatter")
    return scatter is not None and scatter.inputs[2] is not None and scatter.inputs[2].is_graph_input()

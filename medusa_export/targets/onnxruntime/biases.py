"""Masks of attention as biases that are as wide as the caches are filled."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import graph_input
from medusa_export.targets.onnxruntime.constants import initializer, integers

_SEEN, _UNSEEN = "seen", "unseen"


def narrow_masks(graph: ir.Graph, margin: int) -> ir.Value:
    """Makes masks as wide as the caches are filled once a step has written its entries, not as wide as the capacity.

    Args:
        graph: The graph.
        margin: M.

    Returns:
        [B], the number of filled slots of each row, computed at the start of the graph.
    """
    caches = [value for value in graph.inputs if (value.name or "").startswith("past_")]
    capacity = next(  # the tracer takes it from any of the caches
        node.outputs[0]
        for node in graph
        if node.op_type == "Shape" and node.inputs[0] in caches and node.attributes["start"].as_int() == 2
    )
    head = Builder(graph)
    tokens = head("Shape", [graph_input(graph, "input_ids")], start=1, end=2)
    slots = head("Add", [tokens, integers(graph, "margin", [margin])])
    filled = head("Add", [graph_input(graph, "cache_lengths"), slots])
    width = head("ReduceMax", [filled], keepdims=1)
    graph.insert_before(graph[0], head.nodes)
    ir.convenience.replace_all_uses_with(capacity, width)
    return filled


def filled_slots(graph: ir.Graph) -> ir.Value:
    """[1], the number of filled slots of the fullest row, as ``narrow_masks`` computes it."""
    return next(node.outputs[0] for node in graph if node.op_type == "ReduceMax")


def bias_of(graph: ir.Graph, mask: ir.Value, dtype: ir.DataType, unseen: float = -np.inf) -> ir.Value:
    """Makes a bias of a mask: 0 where the mask lets a query look, ``unseen`` elsewhere. A mask of numbers is a bias."""
    if mask.dtype != ir.DataType.BOOL:
        return mask
    pair = [
        initializer(graph, name, np.array(number, dtype=dtype.numpy()))
        for name, number in ((_SEEN, 0.0), (_UNSEEN, unseen))
    ]
    node, maker = ir.node("Where", [mask, *pair]), mask.producer()
    assert maker is not None
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), mask.shape
    graph.insert_after(maker, node)
    return node.outputs[0]


def biases(graph: ir.Graph) -> list[ir.Value]:
    """The biases that ``bias_of`` has made."""
    pair = {f"onnxruntime/{_SEEN}", f"onnxruntime/{_UNSEEN}"}
    return [
        node.outputs[0]
        for node in graph
        if node.op_type == "Where" and {value.name for value in node.inputs[1:] if value is not None} == pair
    ]

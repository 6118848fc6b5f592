"""Derive from a bundle's graph the one that ONNX Runtime runs fastest for several rows.

``GroupQueryAttention`` takes several tokens of one row only. For more rows ``Attention`` becomes
``MultiHeadAttention``, which reads keys and values where they lie in the cache: the query heads that share a key head
are laid out as further tokens of it, so that its entries are read once for all of them. It reads the whole capacity.
New entries are written behind the others of their row by ``TensorScatter``, and none are carried from step to step: as
in the graph for one row, ``accepted_path`` tells the backend what to move. Norms, and what plain steps pass by, are as
there, too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites import producer
from medusa_export.targets.onnxruntime.fusions import finish, flat, take_place_of_merging
from medusa_export.targets.onnxruntime.nodes import CONTRIB, Builder, given, initializer, integers, shape_of

# [B, S, N, g, d] to [B, g, S, N, d], and back.
_INTO_GROUPS = (0, 3, 1, 2, 4)
_OUT_OF_GROUPS = (0, 2, 3, 1, 4)


def fuse_batch_for_onnxruntime(model: ir.Model, *, margin: int) -> bool:
    """Rewrites a step graph in place.

    Args:
        model: A graph of the contract.
        margin: M, the slots in front of the caches.

    Returns:
        False, with nothing done, if ONNX Runtime's operators can't compute this model.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "Attention"]
    single = all(given(node.inputs[0]).dtype == ir.DataType.FLOAT for node in nodes)
    if not single or any(node.attributes["softcap"].as_float() for node in nodes):
        return False
    fusion = _BatchAttention(graph, margin)
    for node in nodes:
        fusion.fuse(node)
    finish(model, margin)
    return True


class _BatchAttention:
    """Puts ``MultiHeadAttention`` in the place of attention, and keeps pending entries out of the caches.

    Args:
        graph: The graph.
        margin: M.
    """

    def __init__(self, graph: ir.Graph, margin: int) -> None:
        self._graph = graph
        self._margin = margin
        self._biases: dict[tuple[ir.Value, int], ir.Value] = {}
        head = Builder(graph)
        lengths = next(value for value in graph.inputs if value.name == "cache_lengths")
        self._slots = head("Add", [lengths, integers(graph, "margin", [margin])])
        graph.insert_before(graph[0], head.nodes)

    def fuse(self, node: ir.Node) -> None:
        """Replaces one ``Attention`` and the changes of layout around it."""
        query, key, value, mask = (given(tensor) for tensor in node.inputs[:4])
        num_heads, kv_heads = shape_of(query)[1], shape_of(key)[1]
        assert isinstance(num_heads, int) and isinstance(kv_heads, int)
        groups, head_dim = num_heads // kv_heads, shape_of(key)[3]
        assert isinstance(head_dim, int)
        for cache in (key, value):
            self._write_new_only(cache)
        build = Builder(self._graph)
        rows = flat(build, query)
        if groups > 1:
            rows = self._exchange(build, rows, [0, -1, kv_heads, groups, head_dim], _INTO_GROUPS, kv_heads * head_dim)
        output = build(
            "MultiHeadAttention",
            [rows, key, value, None, None, self._bias(mask, groups)],
            CONTRIB,
            num_heads=kv_heads,
            scale=node.attributes["scale"].as_float(),
        )
        if groups > 1:
            split = [0, groups, -1, kv_heads, head_dim]
            output = self._exchange(build, output, split, _OUT_OF_GROUPS, num_heads * head_dim)
        self._graph.insert_before(node, build.nodes)
        take_place_of_merging(node, output)

    def _write_new_only(self, cache: ir.Value) -> None:
        scatter = producer(cache, "TensorScatter")
        assert scatter is not None
        if self._margin:
            concat = producer(scatter.inputs[1], "Concat")
            assert concat is not None
            scatter.replace_input_with(1, concat.inputs[1])
            scatter.replace_input_with(2, self._slots)

    def _exchange(
        self, build: Builder, tensor: ir.Value, split: list[int], order: tuple[int, ...], width: int
    ) -> ir.Value:
        """Splits the axes of [B, …, …] as said, brings them into another order, and makes rows of a width of them."""
        parts = build("Reshape", [tensor, integers(self._graph, f"split_{'_'.join(map(str, split))}", split)])
        return build(
            "Reshape",
            [build("Transpose", [parts], perm=order), integers(self._graph, f"rows_{width}", [0, -1, width])],
        )

    def _bias(self, mask: ir.Value, groups: int) -> ir.Value:
        """[B, 1, g · S, C]: 0 where a query may look and -inf elsewhere."""
        key = (mask, groups)
        if key not in self._biases:
            maker = mask.producer()
            assert maker is not None
            pair = [
                initializer(self._graph, name, np.array(number, dtype=np.float32))
                for name, number in (("seen", 0.0), ("unseen", -np.inf))
            ]
            build = Builder(self._graph)
            bias = build("Where", [mask, *pair])
            if groups > 1:
                repeated = build("Expand", [bias, integers(self._graph, f"groups_{groups}", [1, groups, 1, 1])])
                bias = build("Reshape", [repeated, integers(self._graph, "bias_rows", [0, 1, -1, 0])])
            self._graph.insert_after(maker, build.nodes)
            self._biases[key] = bias
        return self._biases[key]

"""Replace attention by ONNX Runtime's attention for several rows."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import given, shape_of
from medusa_export.graph.rewrites.rewrite import NotApplicableError, Rewrite
from medusa_export.targets.onnxruntime.attentions import attentions, require_caches
from medusa_export.targets.onnxruntime.biases import bias_of
from medusa_export.targets.onnxruntime.cache_writes import first_new_slots, write_new_entries_only
from medusa_export.targets.onnxruntime.constants import CONTRIB, integers
from medusa_export.targets.onnxruntime.heads_layout import flat, replace_merged_heads

# [B, S, N, g, d] to [B, g, S, N, d], and back.
_INTO_GROUPS = (0, 3, 1, 2, 4)
_OUT_OF_GROUPS = (0, 2, 3, 1, 4)


class FuseMultiHeadAttention(Rewrite):
    """Makes one ``MultiHeadAttention`` of each attention.

    ``GroupQueryAttention`` takes several tokens of one row only. This operator takes several rows.

    1. ``Attention`` and the changes of layout around it become one ``MultiHeadAttention``, which reads keys and values
       where they lie in the cache, over the whole capacity.
    2. Query heads that share a key head become further tokens of that head, so that its entries are read once.
    3. ``TensorScatter`` writes new entries only, behind the others of their row.

    A graph without ``Attention`` stays as it is: ``MakeAttentionRowExact`` has replaced it.

    Precondition: Keys and values are caches of one head_dim, which layers may share. Queries are fp32; no attention has
    a soft cap.

    Postcondition: Entries of accepted nodes are no longer written. ``ReplacePendingEntries`` must follow, if M > 0.
    """

    name = "fuse_multi_head_attention"

    def requires(self, model: ir.Model) -> None:
        require_caches(attentions(model), "MultiHeadAttention", own=False)
        for node in attentions(model):
            dtype = given(node.inputs[0]).dtype
            if dtype != ir.DataType.FLOAT:
                raise NotApplicableError(f"queries are {dtype}, and MultiHeadAttention with a bias needs fp32")
            grouped = shape_of(given(node.inputs[0]))[1] != shape_of(given(node.inputs[1]))[1]
            if grouped and given(node.inputs[3]).dtype != ir.DataType.BOOL:
                raise NotApplicableError("ALiBi with heads in groups has no layout for MultiHeadAttention")
            if node.attributes["softcap"].as_float():
                raise NotApplicableError("attention has a soft cap, and MultiHeadAttention has none")

    def apply(self, model: ir.Model) -> int:
        found = attentions(model)
        if not found:
            return 0
        fusion = _Fusion(model.graph, self.step.margin)
        for node in found:
            fusion.fuse(node)
        return len(found)


class _Fusion:
    """Replaces attentions one after the other.

    Args:
        graph: The graph.
        margin: M.
    """

    def __init__(self, graph: ir.Graph, margin: int) -> None:
        self._graph = graph
        self._margin = margin
        self._biases: dict[tuple[ir.Value, int], ir.Value] = {}
        self._slots = first_new_slots(graph, margin)

    def fuse(self, node: ir.Node) -> None:
        """Replaces one ``Attention`` and the changes of layout around it."""
        query, key, value, mask = (given(tensor) for tensor in node.inputs[:4])
        num_heads, kv_heads = shape_of(query)[1], shape_of(key)[1]
        assert isinstance(num_heads, int) and isinstance(kv_heads, int)
        groups, head_dim = num_heads // kv_heads, shape_of(key)[3]
        assert isinstance(head_dim, int)
        for cache in (key, value):
            write_new_entries_only(cache, self._margin, self._slots)
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
        replace_merged_heads(node, output)

    def _exchange(
        self, build: Builder, tensor: ir.Value, split: list[int], order: tuple[int, ...], width: int
    ) -> ir.Value:
        """Splits the axes of [B, …, …], permutes them, and merges them into rows [B, …, width]."""
        parts = build("Reshape", [tensor, integers(self._graph, f"split_{'_'.join(map(str, split))}", split)])
        return build(
            "Reshape",
            [build("Transpose", [parts], perm=order), integers(self._graph, f"rows_{width}", [0, -1, width])],
        )

    def _bias(self, mask: ir.Value, groups: int) -> ir.Value:
        """The bias [B, 1, g · S, C] of a mask, made once."""
        key = (mask, groups)
        if key not in self._biases:
            bias = bias_of(self._graph, mask, ir.DataType.FLOAT)
            if groups > 1:
                maker = bias.producer()
                assert maker is not None
                build = Builder(self._graph)
                repeated = build("Expand", [bias, integers(self._graph, f"groups_{groups}", [1, groups, 1, 1])])
                bias = build("Reshape", [repeated, integers(self._graph, "bias_rows", [0, 1, -1, 0])])
                self._graph.insert_after(maker, build.nodes)
            self._biases[key] = bias
        return self._biases[key]

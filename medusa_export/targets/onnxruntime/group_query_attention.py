"""Replace attention and cache updates by ONNX Runtime's attention for one row."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from medusa_export.common.tuning import TABLE_SLACK
from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import given, graph_input, producer, replace_value, shape_of
from medusa_export.graph.rewrites.rewrite import NotApplicableError, Rewrite
from medusa_export.targets.onnxruntime.attentions import attentions, caches_of, require_caches
from medusa_export.targets.onnxruntime.biases import bias_of, filled_slots, narrow_masks
from medusa_export.targets.onnxruntime.constants import CONTRIB, integers
from medusa_export.targets.onnxruntime.heads_layout import flat, replace_merged_heads
from medusa_export.targets.onnxruntime.rotary_tables import RotaryTables

_OPERATOR = "GroupQueryAttention"


class FuseGroupQueryAttention(Rewrite):
    """Makes one ``GroupQueryAttention`` of each attention.

    1. ``Attention``, the two ``TensorScatter`` that write its caches, and the changes of layout around them become
       one ``GroupQueryAttention``. It writes new entries only, in place, and reads no more slots than are filled.
    2. It rotates queries and keys by itself, from tables, where nothing else happens to them on their way from one
       product (see ``RotaryTables.pack``).
    3. Masks become biases, as wide as the caches are filled.
    4. A ``SinkAttention`` (see ``GatherSinks``) becomes one with sinks.

    A graph without ``Attention`` stays as it is: ``MakeAttentionRowExact`` has replaced it.

    Precondition: Each layer has K/V caches of its own, with one head_dim, a multiple of 8; caches are fp32 or fp16.

    Postcondition: Entries of accepted nodes are no longer written. ``ReplacePendingEntries`` must follow, if M > 0.
    """

    name = "fuse_group_query_attention"

    def requires(self, model: ir.Model) -> None:
        found = attentions(model)
        if not found:
            return
        for head_dim in (shape_of(caches_of(node)[0])[3] for node in found):
            if not isinstance(head_dim, int) or head_dim % 8:
                raise NotApplicableError(f"head_dim is {head_dim}, and {_OPERATOR} needs a multiple of 8")
        require_caches(found, _OPERATOR, own=True)
        cache = graph_input(model.graph, "past_key_0")
        if cache.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            raise NotApplicableError(f"the K/V cache is {cache.dtype}, and {_OPERATOR} needs fp32 or fp16")

    def apply(self, model: ir.Model) -> int:
        found = attentions(model)
        if not found:
            return 0
        fusion = _Fusion(model.graph, self.step.margin, self.step.max_positions + TABLE_SLACK)
        for node in found:
            fusion.fuse(node)
        return len(found)


@dataclass(frozen=True)
class _CacheState:
    """Filled slots once a step has written its entries, in the forms that ``GroupQueryAttention`` takes.

    Attributes:
        last: [B] int32, the last filled slot of each row.
        total: int32, the number of filled slots of the fullest row.
    """

    last: ir.Value
    total: ir.Value

    @classmethod
    def of(cls, graph: ir.Graph, margin: int) -> _CacheState:
        """Computes it at the start of the graph, and makes masks as wide as the caches are filled."""
        filled = narrow_masks(graph, margin)
        width = filled_slots(graph)
        maker = width.producer()
        assert maker is not None
        head = Builder(graph)
        last = head("Cast", [head("Sub", [filled, integers(graph, "one", [1])])], to=ir.DataType.INT32)
        total = head("Cast", [head("Squeeze", [width])], to=ir.DataType.INT32)
        graph.insert_after(maker, head.nodes)
        return cls(last, total)


class _Fusion:
    """Replaces attentions one after the other.

    Args:
        graph: The graph.
        margin: M.
        positions: Number of positions in a rotary table.
    """

    def __init__(self, graph: ir.Graph, margin: int, positions: int) -> None:
        self._graph = graph
        self._margin = margin
        self._state = _CacheState.of(graph, margin)
        self._tables = RotaryTables(graph, positions)
        self._biases: dict[ir.Value, ir.Value] = {}  # by mask

    def fuse(self, node: ir.Node) -> None:
        """Replaces one ``Attention``, the two ``TensorScatter`` before it and the changes of layout around it."""
        query, key, value, mask = (given(tensor) for tensor in node.inputs[:4])
        num_heads, head_dim = (shape_of(query)[axis] for axis in (1, 3))
        past, new = zip(*(self._scattered(cache) for cache in (key, value)), strict=True)
        build = Builder(self._graph)
        packed = self._tables.pack(query, *new) if isinstance(head_dim, int) and head_dim % 16 == 0 else None
        if packed is None:
            packed = (*(flat(build, tensor) for tensor in (query, *new)), None, None, None)
        state, bias, sinks = (self._state.last, self._state.total), self._bias(mask, key), node.inputs[4:5]
        inputs = [*packed[:3], *past, *state, *packed[3:], bias, *sinks]
        fused = ir.node(
            _OPERATOR,
            inputs,
            {
                "num_heads": num_heads,
                "kv_num_heads": shape_of(key)[1],
                "do_rotary": int(packed[3] is not None),
                "scale": node.attributes["scale"].as_float(),
                "softcap": node.attributes["softcap"].as_float(),
            },
            domain=CONTRIB,
            num_outputs=3,
            name=f"{node.name}/gqa",
        )
        self._graph.insert_before(node, [*build.nodes, fused])
        for cache, present in zip((key, value), fused.outputs[1:], strict=True):
            replace_value(cache, present)
        replace_merged_heads(node, fused.outputs[0])

    def _scattered(self, cache: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The cache before a step, and the entries that the step adds."""
        scatter = producer(cache, "TensorScatter")
        assert scatter is not None
        block = given(scatter.inputs[1])
        if self._margin:
            concat = producer(block, "Concat")
            assert concat is not None
            block = given(concat.inputs[1])
        return given(scatter.inputs[0]), block

    def _bias(self, mask: ir.Value, like: ir.Value) -> ir.Value:
        """The bias of a mask, made once."""
        if mask not in self._biases:
            assert like.dtype is not None
            self._biases[mask] = bias_of(self._graph, mask, like.dtype)
        return self._biases[mask]

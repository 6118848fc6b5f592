"""Derive from a bundle's graph the one that ONNX Runtime runs fastest.

The standard graph stays as it is; the derived one refers to the same weights and computes the same step
with ONNX Runtime's own operators, in which a decoder layer has a third of the nodes:

* ``Attention`` with its two ``TensorScatter``, and the layout changes around them, become one
  ``GroupQueryAttention``. It appends the new entries to the cache by itself, and reads no more of it than is filled.
* ``Add`` followed by ``RMSNormalization`` becomes one ``SkipSimplifiedLayerNormalization``.
* ``MatMul`` with a transposed weight becomes one ``FusedMatMul`` (see ``onnxruntime_linears``).
* The best token is looked for among the best of blocks of logits: ``ReduceMax`` is vectorised, ``ArgMax`` is not.
* Acceptance, drafting and masks stand in branches of an ``If``: a plain step, which has nothing to accept or to draft
  and looks at all that there is, passes them by.

``GroupQueryAttention`` writes new entries only, so nothing is carried from step to step: in the place of
``pending_kv`` and ``next_pending_kv`` the graph has the output ``accepted_path`` [B, M + 1], by which the
backend moves accepted entries to their places (see ``medusa_runtime.backends.onnxruntime.backend``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as passes

from medusa_export.graph.rewrites import only_user, producer, replace, replace_value
from medusa_export.targets.onnxruntime.linears import fuse_transposed_weights
from medusa_export.targets.onnxruntime.nodes import (
    CONTRIB,
    IR_VERSION,
    PATH,
    Builder,
    given,
    initializer,
    integers,
    rank_of,
    shape_of,
    value_named,
)
from medusa_export.targets.onnxruntime.plain_steps import (
    is_plain_mask,
    is_plain_step,
    skip_mask_in_plain_steps,
    skip_sampling_where_none_draws,
    skip_tree_in_plain_steps,
)

# Rows of rotary tables beyond the longest sequence: for padding, and for drafts at its end that come to nothing.
SLACK = 1024
LARGEST_TABLE = 2**28  # bytes
SMALLEST_BLOCK = 8
_SWAP = (0, 2, 1, 3)  # between [B, S, N, d] and [B, N, S, d]


def fuse_for_onnxruntime(model: ir.Model, *, margin: int, max_positions: int) -> bool:
    """Rewrites a step graph in place.

    Args:
        model: A graph of the contract.
        margin: M, the slots in front of the caches.
        max_positions: The longest sequence of the model.

    Returns:
        False, with nothing done, if ONNX Runtime's operators can't compute this model.
    """
    graph = model.graph
    cache = next(value for value in graph.inputs if value.name == "past_key_0")
    head_dim = cache.shape[3] if cache.shape is not None else None
    if not isinstance(head_dim, int) or head_dim % 8 or cache.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return False
    attention = _AttentionFusion(graph, margin, max_positions + SLACK)
    for node in [node for node in graph if node.op_type == "Attention"]:
        attention.fuse(node)
    sees_all = [bias for mask, bias in attention.biases.items() if is_plain_mask(graph, mask, margin, max_positions)]
    finish(model, margin, sees_all, margin + max_positions + SLACK)
    return True


def finish(model: ir.Model, margin: int, sees_all: Sequence[ir.Value] = (), slots: int = 0) -> None:
    """What all derived graphs have in common, once their attention is done.

    Args:
        model: The graph.
        margin: M.
        sees_all: Biases of attention by which the token of a plain step looks at all that there is.
        slots: How many slots they may have to cover.
    """
    graph = model.graph
    if margin:
        drop_pending(graph)
    fuse_skip_norms(graph)
    fuse_transposed_weights(graph)
    passes.RemoveUnusedNodesPass()(model)
    is_plain = is_plain_step(graph)
    for bias in sees_all:
        skip_mask_in_plain_steps(graph, is_plain, bias, margin, slots)
    if any(value.name == "exponentials" for value in graph.inputs):
        skip_sampling_where_none_draws(graph)
    if margin:
        skip_tree_in_plain_steps(graph, is_plain)
    split_argmax(graph)
    model.opset_imports[CONTRIB] = 1
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    passes.NameFixPass()(model)  # names are unique within a branch only


@dataclass(frozen=True)
class _CacheState:
    """How full the caches are once a step has written to them, as ``GroupQueryAttention`` wants to know it.

    Attributes:
        last: [B] int32, each row's last filled slot.
        total: int32, filled slots of the fullest row.
        width: [1], the same as int64.
    """

    last: ir.Value
    total: ir.Value
    width: ir.Value

    @classmethod
    def of(cls, graph: ir.Graph, margin: int) -> _CacheState:
        """Computes it at the head of the graph, and has masks made as wide as the caches are filled."""
        inputs = {value.name: value for value in graph.inputs}
        capacity = next(
            node.outputs[0]
            for node in graph
            if node.op_type == "Shape"
            and node.inputs[0] is inputs["past_key_0"]
            and node.attributes["start"].as_int() == 2
        )
        lengths = inputs["cache_lengths"]
        head = Builder(graph)
        tokens = head("Shape", [inputs["input_ids"]], start=1, end=2)
        filled = head("Add", [lengths, head("Add", [tokens, integers(graph, "margin", [margin])])])
        width = head("ReduceMax", [filled], keepdims=1)
        last = head("Cast", [head("Sub", [filled, integers(graph, "one", [1])])], to=ir.DataType.INT32)
        total = head("Cast", [head("Squeeze", [width])], to=ir.DataType.INT32)
        graph.insert_before(graph[0], head.nodes)
        ir.convenience.replace_all_uses_with(capacity, width)
        return cls(last, total, width)


class _AttentionFusion:
    """Puts ``GroupQueryAttention`` in the place of attention and the writing of caches.

    Args:
        graph: The graph.
        margin: M.
        positions: How many positions a rotary table holds.
    """

    def __init__(self, graph: ir.Graph, margin: int, positions: int) -> None:
        self._graph = graph
        self._margin = margin
        self._state = _CacheState.of(graph, margin)
        self._tables = _RotaryTables(graph, positions)
        self.biases: dict[ir.Value, ir.Value] = {}  # by mask

    def fuse(self, node: ir.Node) -> None:
        """Replaces one ``Attention``, the two ``TensorScatter`` before it and the changes of layout around it."""
        query, key, value, mask = (given(tensor) for tensor in node.inputs[:4])
        num_heads, head_dim = (shape_of(query)[axis] for axis in (1, 3))
        past, new = zip(*(self._scattered(cache) for cache in (key, value)), strict=True)
        build = Builder(self._graph)
        packed = self._tables.pack(query, *new) if isinstance(head_dim, int) and head_dim % 16 == 0 else None
        if packed is None:
            packed = (*(flat(build, tensor) for tensor in (query, *new)), None, None, None)
        fused = ir.node(
            "GroupQueryAttention",
            [*packed[:3], *past, self._state.last, self._state.total, *packed[3:], self._bias(mask, key)],
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
        take_place_of_merging(node, fused.outputs[0])

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
        """0 where a query may look and -inf elsewhere."""
        if mask not in self.biases:
            assert like.dtype is not None
            pair = [
                initializer(self._graph, name, np.array(number, dtype=like.dtype.numpy()))
                for name, number in (("seen", 0.0), ("unseen", -np.inf))
            ]
            node, maker = ir.node("Where", [mask, *pair]), mask.producer()
            assert maker is not None
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(like.dtype), mask.shape
            self._graph.insert_after(maker, node)
            self.biases[mask] = node.outputs[0]
        return self.biases[mask]


class _RotaryTables:
    """Cosines and sines by position, in place of those that the graph computes for the positions at hand.

    Args:
        graph: The graph that they become part of.
        rows: Positions in a table.
    """

    def __init__(self, graph: ir.Graph, rows: int) -> None:
        self._graph = graph
        self._rows = rows
        self._tables: dict[ir.Value, tuple[ir.Value, ir.Value] | None] = {}
        self._positions: dict[ir.Value, ir.Value] = {}

    def pack(self, query: ir.Value, key: ir.Value, value: ir.Value) -> tuple[ir.Value | None, ...] | None:
        """``GroupQueryAttention``'s query to value and tables to positions, if it can do all from one product.

        That is where query, key and value are the parts of one tensor, the first two with nothing but
        the same rotary embedding on their way.
        """
        turned = [producer(query, "RotaryEmbedding"), producer(key, "RotaryEmbedding")]
        if turned[0] is None or turned[1] is None or turned[0].inputs[1:3] != turned[1].inputs[1:3]:
            return None
        parts = [_unswapped(tensor) for tensor in (turned[0].inputs[0], turned[1].inputs[0], value)]
        split = producer(parts[0], "Split")
        if split is None or list(split.outputs) != parts:
            return None
        found = [self._table(given(table)) for table in turned[0].inputs[1:3]]
        if found[0] is None or found[1] is None or found[0][1] is not found[1][1]:
            return None
        return split.inputs[0], None, None, found[0][0], found[1][0], found[0][1]

    def _table(self, values: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """The table [rows, d / 2] that ``values`` [B, S, d / 2] come from, and their rows; None if it can't be had."""
        if values not in self._tables:
            self._tables[values] = self._evaluate(values)
        return self._tables[values]

    def _evaluate(self, values: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        width = values.shape[-1] if values.shape is not None else None
        positions = _positions_behind(values)
        if positions is None or not isinstance(width, int) or self._rows * width * 4 > LARGEST_TABLE:
            return None
        part = ir.convenience.extract(self._graph, inputs=[positions], outputs=[values])
        evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=IR_VERSION)))
        (rows,) = evaluator.run(None, {positions.name: np.arange(self._rows)[None]})
        return initializer(self._graph, f"{values.name}", rows[0]), self._clipped(positions)

    def _clipped(self, positions: ir.Value) -> ir.Value:
        """Positions that lie within a table, whatever padding there is."""
        if positions not in self._positions:
            last = integers(self._graph, "last_position", [self._rows - 1])
            node = ir.node("Min", [positions, last])
            maker = positions.producer()
            assert maker is not None
            self._graph.insert_after(maker, node)
            self._positions[positions] = node.outputs[0]
        return self._positions[positions]


def _positions_behind(values: ir.Value) -> ir.Value | None:
    """The one [B, S] of integers that ``values`` are computed from; None if there is none, or something besides."""
    found: set[ir.Value] = set()
    stack = [values]
    while stack:
        value = stack.pop()
        if value.dtype == ir.DataType.INT64 and rank_of(value) == 2:
            found.add(value)
        elif not value.is_initializer():
            made_by = value.producer()
            if made_by is None:
                return None
            stack.extend(source for source in made_by.inputs if source is not None)
    return found.pop() if len(found) == 1 else None


def _unswapped(tensor: ir.Value | None) -> ir.Value | None:
    """[B, S, N · d] behind [B, N, S, d]; None if something happens in between."""
    transpose = producer(tensor, "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if reshape is None or tuple(transpose.attributes["perm"].as_ints()) != _SWAP:  # type: ignore[union-attr]
        return None
    return reshape.inputs[0]


def take_place_of_merging(attention: ir.Node, rows: ir.Value) -> None:
    """Rows [B, S, N·d] take the place of what is made of an ``Attention``'s output [B, N, S, d].

    That is a ``Transpose`` and a ``Reshape``; to [B·S, N·d] where what follows wanted that, as in GPT-2.
    """
    transpose = only_user(attention.outputs[0])
    reshape = only_user(transpose.outputs[0]) if transpose is not None else None
    assert reshape is not None and reshape.op_type == "Reshape"  # so our attention function has it
    if rank_of(reshape.outputs[0]) == 3:
        replace_value(reshape.outputs[0], rows)
    else:
        reshape.replace_input_with(0, rows)


def flat(build: Builder, tensor: ir.Value) -> ir.Value:
    """[B, N, S, d] as [B, S, N · d], without undoing a change of layout where one has just been made."""
    rotary = producer(tensor, "RotaryEmbedding")
    if rotary is not None and only_user(tensor) is not None:
        source, cos, sin = (given(value) for value in rotary.inputs[:3])
        return build("RotaryEmbedding", [flat(build, source), cos, sin], interleaved=0, num_heads=shape_of(source)[1])
    transpose = producer(tensor, "Transpose")
    if transpose is not None and tuple(transpose.attributes["perm"].as_ints()) == _SWAP:
        rows = transpose.inputs[0]
    else:
        rows = build("Transpose", [tensor], perm=_SWAP)
    reshape = producer(rows, "Reshape")
    if reshape is not None and reshape.inputs[0] is not None and rank_of(reshape.inputs[0]) == 3:
        return reshape.inputs[0]
    return build("Reshape", [rows, integers(build.graph, "flat", [0, 0, -1])])


def drop_pending(graph: ir.Graph) -> None:
    """Puts the accepted path in the place of what is carried from step to step."""
    graph.outputs.remove(next(value for value in graph.outputs if value.name == "next_pending_kv"))
    graph.inputs.remove(next(value for value in graph.inputs if value.name == "pending_kv"))
    graph.outputs.append(next(value for node in graph for value in node.outputs if value.name == PATH))


def split_argmax(graph: ir.Graph) -> None:
    """Has ``ArgMax`` of logits [B, S, V] look through the best block only; of equals it still gives the first."""
    logits = value_named(graph, "logits")
    vocab_size = shape_of(logits)[-1]
    assert isinstance(vocab_size, int)
    blocks = next(count for count in range(math.isqrt(vocab_size), 0, -1) if vocab_size % count == 0)
    if logits.dtype != ir.DataType.FLOAT or blocks < SMALLEST_BLOCK:
        return
    for argmax in [use.node for use in logits.uses() if use.node.op_type == "ArgMax"]:
        width = integers(graph, "block", vocab_size // blocks)
        make = Builder(graph)
        parted = make("Reshape", [logits, integers(graph, "blocks", [0, 0, blocks, vocab_size // blocks])])
        best = make("ReduceMax", [parted, integers(graph, "last_of_four", [3])], keepdims=0)
        block = make("ArgMax", [best], axis=-1, keepdims=1)
        inside = make("ArgMax", [make("GatherND", [parted, block], batch_dims=2)], axis=-1, keepdims=0)
        first = make("Mul", [make("Squeeze", [block, integers(graph, "last_of_three", [2])]), width])
        make("Add", [first, inside])
        replace(argmax.outputs[0], make.nodes)


def fuse_skip_norms(graph: ir.Graph) -> None:
    """Makes ``Add`` followed by ``RMSNormalization`` one node."""
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        total = producer(norm.inputs[0], "Add")
        if total is None or any(
            value is None or rank_of(value) != 3 or value.is_initializer() for value in total.inputs
        ):
            continue
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*total.inputs, norm.inputs[1]],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            domain=CONTRIB,
            num_outputs=4,
            name=f"{norm.name}/skip",
        )
        graph.insert_before(norm, fused)
        replace_value(norm.outputs[0], fused.outputs[0])
        replace_value(total.outputs[0], fused.outputs[3])

"""Replace attention by plain operators that give each row the same bits whatever its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from medusa_export.common.tuning import TABLE_SLACK
from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import given, graph_input, replace, shape_of
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.attentions import (
    IntegerCache,
    attentions,
    caches_of,
    reads_caches,
    reads_integers,
)
from medusa_export.targets.onnxruntime.biases import bias_of, filled_slots, narrow_masks
from medusa_export.targets.onnxruntime.cache_writes import first_new_slots, write_new_entries_only
from medusa_export.targets.onnxruntime.constants import CONTRIB, initializer, integers, target_shape
from medusa_export.targets.onnxruntime.rotary_tables import RotaryTables
from medusa_runtime.bundles.slots import PANEL

# Products of at most this many terms are summed in one chain, however threads share them.
_LONGEST_SUM = 256
# A factor other than 1 keeps products of one row from a kernel that sums in another order. It cancels, exactly.
_FACTOR = 2.0
# The least exponent of a weight. Lower ones give numbers below 1e-38, which take a processor ten times as long.
_LEAST_EXPONENT = -80.0
# Equal columns of the denominators. With a single column, sums over panels would be in another order.
_COLUMNS = 16
# [B, 1, S, P, panel] to [B, 1, P, S, panel].
_BY_PANELS = (0, 1, 3, 2, 4)


class MakeAttentionRowExact(Rewrite):
    """Makes attention of operators in which the bits of a row don't depend on other rows, or on the capacity.

    It is for bundles with weights in integers, and for those with caches of integers. Products with such weights round
    activations to 8 bits, and such caches round entries. So a difference in the last bit of an attention would become
    a difference of 1 / 256.

    1. ``Attention`` becomes two ``FusedMatMul``, a softmax of plain operators, and sums over panels of ``PANEL`` slots.
       A panel is summed in the order of its slots, and panels in their order. Weights below exp(-80) of the largest one
       are 0, so slots that a query doesn't see add exact zeros. So gaps between the entries of a path change nothing,
       as long as all the nodes of a tree behind the root are in one panel (see ``SlotLayout.size_within_panel``).
    2. Query heads that share a key head become further rows of one product.
    3. ``TensorScatter`` writes new entries only, behind the others of their row.
    4. Cosines and sines are gathered from tables, if these are not too large.
    5. Masks become biases, made as wide as the caches are filled and padded to the capacity.
    6. Caches of integers are cast, and not multiplied by their scales. The scales of keys are factors of the scores,
       and those of values are factors of the weights.

    Other graphs stay as they are: those with all weights in the dtype that the bundle computes in and caches in fp32,
    with caches in fp16 or bf16, latent caches, sinks, keys and values of different sizes, or a head_dim above 256. So
    do those of mixtures of experts with caches in fp32: the tokens decide how many rows an expert's products have, and
    with the number of rows their bits may change. With ``StepFacts.fused_attention``, all graphs with caches in fp32
    stay as they are.

    Postcondition: Entries of accepted nodes are no longer written. ``ReplacePendingEntries`` must follow, if M > 0. The
    capacity must be a multiple of ``PANEL``.
    """

    name = "make_attention_row_exact"

    def apply(self, model: ir.Model) -> int:
        found = attentions(model)
        weights_need_it = self.step.weights.has_integers and not self.step.has_experts
        is_needed = weights_need_it and not self.step.fused_attention
        if not all(_is_fit(node) for node in found) or not (is_needed or any(map(reads_integers, found))):
            return 0
        replacement = _Replacement(model.graph, self.step.margin, self.step.max_positions + TABLE_SLACK)
        replacement.use_tables()
        for node in found:
            replacement.replace(node)
        return len(found)


def _is_fit(node: ir.Node) -> bool:
    key, _ = caches_of(node)
    head_dim = shape_of(key)[3]
    short = isinstance(head_dim, int) and head_dim <= _LONGEST_SUM
    reads = reads_caches(node) or reads_integers(node)
    return node.op_type == "Attention" and reads and key.dtype == ir.DataType.FLOAT and short


@dataclass(frozen=True)
class _Panels:
    """Keys or values by panels of slots.

    Attributes:
        entries: [B, N, P, panel, d].
        scales: [B, N, P, 1, panel], the factors of the entries; None for entries without factors.
    """

    entries: ir.Value
    scales: ir.Value | None = None


class _Replacement:
    """Replaces attentions one after the other.

    Args:
        graph: The graph.
        margin: M.
        positions: Number of positions in a rotary table.
    """

    def __init__(self, graph: ir.Graph, margin: int, positions: int) -> None:
        self._graph = graph
        self._shape = partial(target_shape, graph)
        self._margin = margin
        self._tables = RotaryTables(graph, positions)
        self._biases: dict[tuple[ir.Value, int], ir.Value] = {}
        self._slots = first_new_slots(graph, margin)
        head = Builder(graph)
        self._least_weight = head("Exp", [_number(head, "least_exponent", _LEAST_EXPONENT)])
        self._capacity = head("Shape", [graph_input(graph, "past_key_0")], start=2, end=3)
        narrow_masks(graph, margin)
        self._unfilled = head("Sub", [self._capacity, filled_slots(graph)])
        maker = filled_slots(graph).producer()
        assert maker is not None
        graph.insert_after(maker, head.nodes)

    def use_tables(self) -> None:
        """Makes rotary embeddings read cosines and sines from tables."""
        known: dict[ir.Value, ir.Value | None] = {}
        for node in [node for node in self._graph if node.op_type == "RotaryEmbedding"]:
            for place in (1, 2):
                values = given(node.inputs[place])
                if values not in known:
                    known[values] = self._tables.gathered(values)
                if (table := known[values]) is not None:
                    node.replace_input_with(place, table)

    def replace(self, node: ir.Node) -> None:
        """Replaces one ``Attention``."""
        query, key, value, mask = (given(tensor) for tensor in node.inputs[:4])
        num_heads, kv_heads, head_dim = shape_of(query)[1], shape_of(key)[1], shape_of(key)[3]
        assert isinstance(num_heads, int) and isinstance(kv_heads, int) and isinstance(head_dim, int)
        build = Builder(self._graph)
        rows = build("Reshape", [query, self._shape(0, kv_heads, 1, -1, head_dim)])
        keys, values = (self._panels(build, cache, head_dim) for cache in (key, value))
        scores = _scores(build, rows, keys.entries, node.attributes["scale"].as_float())
        if keys.scales is not None:
            scores = build("Mul", [scores, keys.scales])
        scores = _capped(build, scores, node.attributes["softcap"].as_float())
        scores = build("Add", [scores, self._bias(mask, num_heads // kv_heads)])
        output = _weighted(build, self._weights(build, scores), values)
        build("Reshape", [output, self._shape(0, num_heads, -1, head_dim)])
        replace(node.outputs[0], build.nodes)

    def _panels(self, build: Builder, cache: ir.Value, head_dim: int) -> _Panels:
        """A cache by panels. Makes it take new entries only."""
        rounded = IntegerCache.of(cache)
        for part in (cache,) if rounded is None else (rounded.integers, rounded.scales):
            write_new_entries_only(part, self._margin, self._slots)
        by_panels = self._shape(0, 0, -1, PANEL, head_dim)
        if rounded is None:
            return _Panels(build("Reshape", [cache, by_panels]))
        integers = build("Reshape", [rounded.integers, by_panels])
        return _Panels(
            build("Cast", [integers], to=ir.DataType.FLOAT),
            build("Reshape", [rounded.scales, self._shape(0, 0, -1, 1, PANEL)]),
        )

    def _weights(self, build: Builder, scores: ir.Value) -> ir.Value:
        """exp(score - largest score of the row), less the least weight: exactly 0 for slots that are not seen."""
        last, panels = integers(build.graph, "last_of_five", [4]), integers(build.graph, "panels_axis", [2])
        largest = build("ReduceMax", [build("ReduceMax", [scores, last], keepdims=1), panels], keepdims=1)
        exponents = build("Max", [build("Sub", [scores, largest]), _number(build, "least_exponent", _LEAST_EXPONENT)])
        return build("Sub", [build("Exp", [exponents]), self._least_weight])

    def _bias(self, mask: ir.Value, groups: int) -> ir.Value:
        """The bias [B, 1, P, g · S, panel] of a mask, made once."""
        key = (mask, groups)
        if key not in self._biases:
            bias = bias_of(self._graph, mask, ir.DataType.FLOAT)
            build = Builder(self._graph)
            unseen = initializer(self._graph, "unseen", np.array(-np.inf, np.float32))
            pads = build("Concat", [integers(self._graph, "from_zero", [0]), self._unfilled], axis=0)
            padded = build("Pad", [bias, pads, unseen, integers(self._graph, "last_axis", [3])])
            panels = build("Reshape", [padded, self._shape(0, 0, 0, -1, PANEL)])
            by_panels = build("Transpose", [panels], perm=_BY_PANELS)
            if groups > 1:
                by_panels = build("Concat", [by_panels] * groups, axis=3)
            maker = bias.producer()
            assert maker is not None
            self._graph.insert_after(maker, build.nodes)
            self._biases[key] = by_panels
        return self._biases[key]


def _scores(build: Builder, rows: ir.Value, keys: ir.Value, scale: float) -> ir.Value:
    """Products of queries [B, N, 1, g · S, d] and keys [B, N, P, panel, d]: [B, N, P, g · S, panel]."""
    if scale != 1.0:
        return build("FusedMatMul", [rows, keys], CONTRIB, transB=1, alpha=scale)
    doubled = build("FusedMatMul", [rows, keys], CONTRIB, transB=1, alpha=_FACTOR)
    return build("Mul", [doubled, _number(build, "inverse_factor", 1 / _FACTOR)])


def _capped(build: Builder, scores: ir.Value, cap: float) -> ir.Value:
    """Scores within a soft cap; as they are if it is 0."""
    if not cap:
        return scores
    number = _number(build, f"soft_cap_{cap}", cap)
    return build("Mul", [build("Tanh", [build("Div", [scores, number])]), number])


def _weighted(build: Builder, weights: ir.Value, values: _Panels) -> ir.Value:
    """The mean [B, N, g · S, d] of values by weights [B, N, P, g · S, panel]."""
    ones = initializer(build.graph, "ones", np.ones((PANEL, _COLUMNS), np.float32))
    panels = integers(build.graph, "panels_axis", [2])
    scaled = weights if values.scales is None else build("Mul", [weights, values.scales])
    sums = [
        build("ReduceSum", [build("FusedMatMul", [factors, terms], CONTRIB, alpha=_FACTOR), panels], keepdims=0)
        for factors, terms in ((scaled, values.entries), (weights, ones))
    ]
    start, end, axis = (
        integers(build.graph, *named) for named in (("from_zero", [0]), ("one", [1]), ("last_axis", [3]))
    )
    return build("Div", [sums[0], build("Slice", [sums[1], start, end, axis])])


def _number(build: Builder, name: str, number: float) -> ir.Value:
    return initializer(build.graph, name, np.array(number, np.float32))

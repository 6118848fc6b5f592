"""Attend to latent caches without expanding them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import given, producer, replace, shape_of
from medusa_export.graph.rewrites.rewrite import NotApplicableError, Rewrite
from medusa_export.targets.onnxruntime.attentions import attentions, preceding
from medusa_export.targets.onnxruntime.biases import bias_of, filled_slots, narrow_masks
from medusa_export.targets.onnxruntime.cache_writes import first_new_slots, write_new_entries_only
from medusa_export.targets.onnxruntime.constants import CONTRIB, integers, target_shape


class AbsorbLatentExpansion(Rewrite):
    """Projects queries into the space of a latent cache, instead of expanding the cache in each step.

    An entry of the cache is a latent c and a rotated part r, which all heads share. A head's key is (c K, r), and its
    value is c V. A query is (q, p).

    1. The score q (c K)ᵀ + p rᵀ is computed as (q Kᵀ) cᵀ + p rᵀ, and the weighted sum of values as (Σ w c) V. So no
       product grows with entries times heads times the size of K and V.
    2. Queries of all heads become rows of one product.
    3. Attention reads no more slots than are filled. Masks become biases of that width.
    4. ``TensorScatter`` writes new entries only, behind the others of their row.

    A graph without latent caches stays as it is.

    Precondition: All attentions read latent caches in fp32. No weights are integers, and those that expand the caches
    are not fp8.

    Postcondition: Entries of accepted nodes are no longer written. ``ReplacePendingEntries`` must follow, if M > 0.
    """

    name = "absorb_latent_expansion"

    def requires(self, model: ir.Model) -> None:
        nodes = attentions(model)
        found = [_LatentAttention.of(node) for node in nodes]
        if not any(found):
            return
        if not all(found):
            raise NotApplicableError("only some layers have a latent cache")
        if any(given(node.inputs[0]).dtype != ir.DataType.FLOAT for node in nodes):
            raise NotApplicableError("latent caches are not fp32, and ONNX Runtime has such products for fp32 only")
        if self.step.weights.has_integers:
            raise NotApplicableError(
                "weights are integers, and products with latent caches may differ in their last bits between tree sizes"
            )
        if not all(_is_constant(one.weight) for one in found if one is not None):
            raise NotApplicableError("the weights that expand latent caches are fp8")

    def apply(self, model: ir.Model) -> int:
        found = [one for node in attentions(model) if (one := _LatentAttention.of(node)) is not None]
        if found:
            absorption = _Absorption(model.graph, self.step.margin)
            for one in found:
                absorption.replace(one)
        return len(found)


@dataclass(frozen=True)
class _LatentAttention:
    """An attention over a latent cache.

    Attributes:
        node: The ``Attention``.
        latent: [B, 1, C, rank], the cache that keys and values are computed from.
        rotated: [B, 1, C, rotated size], the cache of the rotated parts of keys.
        weight: [rank, N · (key size + value size)], which expands an entry.
        query: [B, N, S, key size], the part of the queries that meets expanded keys.
        query_rotated: [B, N, S, rotated size].
    """

    node: ir.Node
    latent: ir.Value
    rotated: ir.Value
    weight: ir.Value
    query: ir.Value
    query_rotated: ir.Value

    @classmethod
    def of(cls, node: ir.Node) -> _LatentAttention | None:
        """Finds the parts of an ``Attention``; None if it has others."""
        query, key = producer(node.inputs[0], "Concat"), producer(node.inputs[1], "Concat")
        split = producer(node.inputs[2], "Split")
        product = preceding(split, "Transpose", "Reshape", "Squeeze", "MatMul")
        if query is None or key is None or product is None or split is None or node.attributes["softcap"].as_float():
            return None
        expand = producer(key.inputs[1], "Expand")
        if list(split.outputs) != [key.inputs[0], node.inputs[2]] or expand is None or len(query.inputs) != 2:
            return None
        latent, weight, rotated = (given(value) for value in (*product.inputs, expand.inputs[0]))
        caches = [producer(value, "TensorScatter") for value in (latent, rotated)]
        sizes = [shape_of(given(one.inputs[0]))[3] for one in (query, key)]
        if None in caches or sizes[0] != sizes[1]:
            return None
        return cls(node, latent, rotated, weight, given(query.inputs[0]), given(query.inputs[1]))

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, rank, key size and value size."""
        num_heads, key_size = shape_of(self.query)[1], shape_of(self.query)[3]
        rank, value_size = shape_of(self.latent)[3], shape_of(given(self.node.inputs[2]))[3]
        assert isinstance(num_heads, int) and isinstance(rank, int)
        assert isinstance(key_size, int) and isinstance(value_size, int)
        return num_heads, rank, key_size, value_size


def _is_constant(weight: ir.Value) -> bool:
    """Returns True if ONNX Runtime knows a weight while it loads a graph. It casts those in half precision then."""
    cast = producer(weight, "Cast")
    return weight.is_initializer() or (cast is not None and given(cast.inputs[0]).is_initializer())


class _Absorption:
    """Replaces attentions one after the other.

    Args:
        graph: The graph.
        margin: M.
    """

    def __init__(self, graph: ir.Graph, margin: int) -> None:
        self._graph = graph
        self._shape = partial(target_shape, graph)
        self._margin = margin
        self._slots = first_new_slots(graph, margin)
        narrow_masks(graph, margin)
        self._filled = filled_slots(graph)

    def replace(self, found: _LatentAttention) -> None:
        """Replaces one ``Attention``."""
        scale, mask = found.node.attributes["scale"].as_float(), given(found.node.inputs[3])
        for cache in (found.latent, found.rotated):
            write_new_entries_only(cache, self._margin, self._slots)
        build = Builder(self._graph)
        num_heads, rank, key_size, value_size = found.sizes
        by_heads = build("Reshape", [found.weight, self._shape(rank, num_heads, key_size + value_size)])
        to_latent = build("Transpose", [self._cut(build, by_heads, 0, key_size)], perm=(1, 2, 0))
        to_values = build("Transpose", [self._cut(build, by_heads, key_size, key_size + value_size)], perm=(1, 0, 2))

        latent, rotated = (self._filled_part(build, cache) for cache in (found.latent, found.rotated))
        scores = build(
            "Add",
            [
                self._scores(build, build("MatMul", [found.query, to_latent]), latent, scale),
                self._scores(build, found.query_rotated, rotated, scale),
            ],
        )
        shape = build("Concat", [self._shape(0, num_heads, -1), self._filled], axis=0)
        bias = bias_of(self._graph, mask, ir.DataType.FLOAT)
        weights = build("Softmax", [build("Add", [build("Reshape", [scores, shape]), bias])], axis=-1)
        rows = build("Concat", [self._shape(0, 1, -1), self._filled], axis=0)
        mean = build("MatMul", [build("Reshape", [weights, rows]), latent])
        build("MatMul", [build("Reshape", [mean, self._shape(0, num_heads, -1, rank)]), to_values])
        replace(found.node.outputs[0], build.nodes)

    def _scores(self, build: Builder, queries: ir.Value, entries: ir.Value, scale: float) -> ir.Value:
        """Products of queries [B, N, S, d] and entries [B, 1, filled, d], as rows [B, 1, N · S, filled]."""
        size = shape_of(entries)[3]
        assert isinstance(size, int)
        rows = build("Reshape", [queries, self._shape(0, 1, -1, size)])
        return build("FusedMatMul", [rows, entries], CONTRIB, transB=1, alpha=scale)

    def _filled_part(self, build: Builder, cache: ir.Value) -> ir.Value:
        """The filled slots of a cache [B, 1, C, d]."""
        start, axis = integers(self._graph, "from_zero", [0]), integers(self._graph, "third_axis", [2])
        part = build("Slice", [cache, start, self._filled, axis])
        part.shape, part.type = ir.Shape([None, 1, None, shape_of(cache)[3]]), cache.type
        return part

    def _cut(self, build: Builder, weight: ir.Value, start: int, end: int) -> ir.Value:
        """Columns of a weight [rank, N, columns]. ONNX Runtime computes them once, while it loads the graph."""
        bounds = (integers(self._graph, f"column_{bound}", [bound]) for bound in (start, end))
        return build("Slice", [weight, *bounds, integers(self._graph, "third_axis", [2])])

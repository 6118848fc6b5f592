"""The attentions of a graph, and what ONNX Runtime's attention asks of their caches."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from medusa_export.graph.rewrites.matching import given, producer, shape_of
from medusa_export.graph.rewrites.rewrite import NotApplicableError

# An attention with sinks in a graph that is being rewritten, see ``GatherSinks``.
SINK_ATTENTION = "SinkAttention"


def attentions(model: ir.Model) -> list[ir.Node]:
    """The attentions of a graph. One with sinks has them as its fifth input."""
    return [node for node in model.graph if node.op_type in ("Attention", SINK_ATTENTION)]


def preceding(node: ir.Node | None, *op_types: str, place: int = 0) -> ir.Node | None:
    """The node that is found by going back from ``node`` over nodes of these types; None if there is none.

    Args:
        node: The node to begin with.
        op_types: The types in the order in which they are met. Of each node on the way, the first input is followed.
        place: The input of ``node`` that is followed.
    """
    for op_type in op_types:
        node = producer(node.inputs[place], op_type) if node is not None else None
        place = 0
    return node


def caches_of(node: ir.Node) -> list[ir.Value]:
    """The keys and values that an attention reads."""
    return [given(value) for value in node.inputs[1:3]]


def reads_caches(node: ir.Node) -> bool:
    """Returns True if an attention reads keys and values of one head_dim as they are in the caches."""
    caches = caches_of(node)
    sizes = {shape_of(cache)[3] for cache in caches}
    return len(sizes) == 1 and all(producer(cache, "TensorScatter") for cache in caches)


@dataclass(frozen=True)
class IntegerCache:
    """A cache of 8-bit integers that an attention reads.

    Attributes:
        integers: [B, N, C, d], int8.
        scales: [B, N, C, 1], the scale of each entry.
    """

    integers: ir.Value
    scales: ir.Value

    @classmethod
    def of(cls, value: ir.Value | None) -> IntegerCache | None:
        """The cache that is read as ``value``, its integers times their scales; None if it is something else."""
        product = producer(value, "Mul")
        cast = preceding(product, "Cast")
        if product is None or cast is None:
            return None
        integers, scales = given(cast.inputs[0]), given(product.inputs[1])
        if integers.dtype != ir.DataType.INT8 or not all(producer(one, "TensorScatter") for one in (integers, scales)):
            return None
        return cls(integers, scales)


def reads_integers(node: ir.Node) -> bool:
    """Returns True if an attention reads keys and values of one head_dim in caches of 8-bit integers."""
    caches = caches_of(node)
    return len({shape_of(cache)[3] for cache in caches}) == 1 and all(map(IntegerCache.of, caches))


def require_caches(nodes: list[ir.Node], operator: str, *, own: bool) -> None:
    """Refuses attentions that an operator can't compute over the caches.

    Args:
        nodes: The attentions.
        operator: The operator's name.
        own: Whether each attention must write the caches that it reads, so that no other may read them.

    Raises:
        NotApplicableError: An attention reads something else.
    """
    if any(IntegerCache.of(cache) for node in nodes for cache in caches_of(node)):
        raise NotApplicableError(f"keys and values are 8-bit integers, and {operator} does not read them so")
    if not all(reads_caches(node) for node in nodes):
        raise NotApplicableError(
            f"keys and values are computed from a latent cache, or differ in size, and {operator} reads them in caches "
            "of one head_dim"
        )
    read = [cache for node in nodes for cache in caches_of(node)]
    if own and len(set(read)) < len(read):
        raise NotApplicableError(f"layers share keys and values, and {operator} writes those that it reads")

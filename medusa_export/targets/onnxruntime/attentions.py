"""The attentions of a graph, and what ONNX Runtime's attention asks of their caches."""

from __future__ import annotations

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
    """Whether an attention reads its keys and values as they are in the caches, and both have one head_dim."""
    caches = caches_of(node)
    sizes = {shape_of(cache)[3] for cache in caches}
    return len(sizes) == 1 and all(producer(cache, "TensorScatter") for cache in caches)


def require_caches(nodes: list[ir.Node], operator: str, *, own: bool) -> None:
    """Refuses attentions that an operator can't compute over the caches.

    Args:
        nodes: The attentions.
        operator: The operator's name.
        own: Whether each attention must write the caches that it reads, so that no other may read them.

    Raises:
        NotApplicableError: An attention reads something else.
    """
    if not all(reads_caches(node) for node in nodes):
        raise NotApplicableError(
            f"keys and values are computed from a latent cache, or differ in size, and {operator} reads them in caches "
            "of one head_dim"
        )
    read = [cache for node in nodes for cache in caches_of(node)]
    if own and len(set(read)) < len(read):
        raise NotApplicableError(f"layers share keys and values, and {operator} writes those that it reads")

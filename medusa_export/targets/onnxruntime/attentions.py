"""The attentions of a graph, and what ONNX Runtime's attention asks of their caches."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.matching import given, producer, shape_of
from medusa_export.graph.rewrites.rewrite import NotApplicableError


def attentions(model: ir.Model) -> list[ir.Node]:
    """The ``Attention`` nodes of a graph."""
    return [node for node in model.graph if node.op_type == "Attention"]


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

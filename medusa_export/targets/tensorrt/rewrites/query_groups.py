"""Read keys and values once for all query heads that share them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import initializer
from medusa_export.graph.rewrites.rewrite import Rewrite


class FoldQueryGroups(Rewrite):
    """Makes grouped-query attention an attention over the key/value heads alone.

    1. Queries [B, G · N, S, d] are read as [B, N, G · S, d], as they lie in memory, under a mask of G copies. The
       result is read as [B, G · N, S, d].

    TensorRT would copy keys and values for each query head: the whole cache, in every layer and step.
    """

    name = "fold_query_groups"

    def apply(self, model: ir.Model) -> int:
        masks: dict[tuple[ir.Value, int], ir.Value] = {}
        attentions = [node for node in model.graph if node.op_type == "Attention"]
        return sum(_fold(model.graph, node, masks) for node in attentions)


def _fold(graph: ir.Graph, node: ir.Node, masks: dict[tuple[ir.Value, int], ir.Value]) -> bool:
    """Folds the groups of one attention. ``masks`` maps a mask and a number to that number of copies."""
    query, key, _, mask = node.inputs[:4]
    result = node.outputs[0]
    if query is None or key is None or mask is None or query.shape is None or key.shape is None:
        return False
    queries, heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    if not (isinstance(queries, int) and isinstance(heads, int) and isinstance(head_dim, int)) or queries == heads:
        return False
    groups = queries // heads
    if (mask, groups) not in masks:
        tiled = ir.node("Concat", [mask] * groups, {"axis": 2}, name=f"{mask.name}/for_{groups}_groups")
        tiled.outputs[0].type = mask.type
        graph.insert_before(node, tiled)
        masks[mask, groups] = tiled.outputs[0]
    into = initializer(graph, f"to_{heads}_heads_of_{head_dim}", np.array([0, heads, -1, head_dim], np.int64))
    back = initializer(graph, f"to_{queries}_heads_of_{head_dim}", np.array([0, queries, -1, head_dim], np.int64))
    fold = ir.node("Reshape", [query, into], {"allowzero": 0}, name=f"{node.name}/fold_groups")
    unfold = ir.node("Reshape", [result, back], {"allowzero": 0}, name=f"{node.name}/unfold_groups")
    graph.insert_before(node, fold)
    graph.insert_after(node, unfold)
    node.replace_input_with(0, fold.outputs[0])
    node.replace_input_with(3, masks[mask, groups])
    fold.outputs[0].type = query.type
    unfold.outputs[0].type, unfold.outputs[0].shape = result.type, result.shape
    ir.convenience.replace_all_uses_with(result, unfold.outputs[0])
    unfold.replace_input_with(0, result)  # the line above replaced this use too
    result.shape = None
    return True

"""Pick parts of a tensor by index."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder, initializer
from medusa_export.graph.rewrites.matching import constant
from medusa_export.graph.rewrites.rewrite import Rewrite


class PickParts(Rewrite):
    """Makes one ``Gather`` per part of a ``Split``.

    1. Parts along the heads of [B, N, S, d] are gathered by the numbers of their heads.
    2. Equal parts along the last axis of [B, S, H] get an axis of their own first, and are gathered by number.

    TensorRT's parser makes 4 to 7 layers of each part that it slices out, and one of a gather. The kernels are the
    same, since TensorRT fuses either.

    Precondition: ``SplitHeadsLast`` has run.
    """

    name = "pick_parts"

    def apply(self, model: ir.Model) -> int:
        splits = [node for node in model.graph if node.op_type == "Split" and len(node.inputs) == 2]
        return sum(_pick(model.graph, split) for split in splits)


def _pick(graph: ir.Graph, split: ir.Node) -> bool:
    source, sizes = split.inputs[0], constant(split.inputs[1])
    shape = split.outputs[0].shape
    if source is None or sizes is None or shape is None:
        return False
    axis, rank = split.attributes["axis"].as_int(), len(shape)
    add = Builder(graph, split.name or "split")
    if rank == 4 and axis == 1:
        bounds = pairwise(np.cumsum([0, *sizes]).tolist())
        picks = [initializer(graph, f"heads_{begin}_{end}", np.arange(begin, end)) for begin, end in bounds]
    elif rank == 3 and axis in (2, -1) and len(set(sizes.tolist())) == 1:
        apart = initializer(graph, f"in_{len(sizes)}_parts", np.array([0, 0, len(sizes), -1], np.int64))
        source, axis = add("Reshape", [source, apart], allowzero=0), 2
        picks = [initializer(graph, f"part_{i}", np.array(i, np.int64)) for i in range(len(sizes))]
    else:
        return False
    for old, pick in zip(split.outputs, picks, strict=True):
        part = add("Gather", [source, pick], axis=axis)
        part.type, part.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, part)
    graph.insert_before(split, add.nodes)
    return True

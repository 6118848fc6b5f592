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
    same, since TensorRT fuses either. Rule 2 also holds for tables of cosines, of which one half is read: a gather of
    its columns would be one layer less, but TensorRT-RTX can't build Qwen2 in fp16 with it.

    Precondition: ``SplitHeadsLast`` has run.
    """

    name = "pick_parts"

    def apply(self, model: ir.Model) -> int:
        splits = [node for node in model.graph if node.domain == "" and node.op_type == "Split"]
        return sum(_pick(model.graph, split) for split in splits)


def _pick(graph: ir.Graph, split: ir.Node) -> bool:
    source, sizes = split.inputs[0], _sizes(split)
    shape = split.outputs[0].shape
    if source is None or sizes is None or shape is None:
        return False
    axis, rank = split.attributes["axis"].as_int(), len(shape)
    bounds = list(pairwise(np.cumsum([0, *sizes]).tolist()))
    read = [index for index, part in enumerate(split.outputs) if part.uses()]
    add = Builder(graph, split.name or "split")
    if rank == 4 and axis == 1:
        picks = {i: initializer(graph, f"heads_{bounds[i][0]}_{bounds[i][1]}", np.arange(*bounds[i])) for i in read}
    elif rank == 3 and axis in (2, -1) and len(set(sizes)) == 1:
        apart = initializer(graph, f"in_{len(sizes)}_parts", np.array([0, 0, len(sizes), -1], np.int64))
        source, axis = add("Reshape", [source, apart], allowzero=0), 2
        picks = {i: initializer(graph, f"part_{i}", np.array(i, np.int64)) for i in read}
    else:
        return False
    for index, pick in picks.items():
        old = split.outputs[index]
        part = add("Gather", [source, pick], axis=axis)
        part.type, part.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, part)
    graph.insert_before(split, add.nodes)
    return True


def _sizes(split: ir.Node) -> list[int] | None:
    """The sizes of the parts; None if they are not known."""
    if len(split.inputs) == 2:
        sizes = constant(split.inputs[1])
        return None if sizes is None else sizes.tolist()
    shape, axis = split.outputs[0].shape, split.attributes["axis"].as_int()
    size = shape[axis] if shape is not None else None
    return [size] * len(split.outputs) if isinstance(size, int) else None

"""Write out clips of whole numbers."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import replace
from medusa_export.graph.rewrites.rewrite import Rewrite


class SpellOutClips(Rewrite):
    """Makes ``Max`` and ``Min`` of a ``Clip`` of whole numbers.

    1. ``Clip`` becomes ``Max`` with its lower bound and ``Min`` with its upper one. A ``Clip`` with one bound becomes
       one node.

    TensorRT's parser does the same, but also bounds by the limits of the type, and reshapes the bounds.

    Postcondition: ``BroadcastConstants`` can give the bounds their rank.
    """

    name = "spell_out_clips"

    def apply(self, model: ir.Model) -> int:
        clips = [node for node in model.graph if node.domain == "" and node.op_type == "Clip"]
        return sum(_spell_out(model.graph, clip) for clip in clips)


def _spell_out(graph: ir.Graph, clip: ir.Node) -> bool:
    source, *bounds = clip.inputs
    if source is None or source.dtype not in (ir.DataType.INT32, ir.DataType.INT64):
        return False
    add = Builder(graph, clip.name or "clip")
    value = source
    for op_type, bound in zip(("Max", "Min"), bounds, strict=False):
        if bound is not None:
            value = add(op_type, [value, bound])
            value.type, value.shape = source.type, source.shape
    if not add.nodes:
        return False
    replace(clip.outputs[0], add.nodes)
    return True

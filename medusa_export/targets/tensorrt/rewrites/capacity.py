"""Fix the capacity of caches."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import initializer
from medusa_export.graph.rewrites.matching import holds, producer
from medusa_export.graph.rewrites.rewrite import NotApplicableError, Rewrite

_LENGTH = 2  # the axis of a cache's slots


class FreezeCapacity(Rewrite):
    """Fixes the capacity of caches. TensorRT updates a cache in place only if its length is fixed.

    1. The dimension ``capacity`` of inputs and outputs becomes a number.
    2. A ``Range`` up to the capacity becomes a constant.

    Precondition: The number is known.
    """

    name = "freeze_capacity"

    def requires(self, model: ir.Model) -> None:
        if self.step.capacity is None:
            raise NotApplicableError("the capacity of the caches is not known")

    def apply(self, model: ir.Model) -> int:
        assert self.step.capacity is not None
        count = 0
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.shape is not None and any(str(size) == "capacity" for size in value.shape):
                sizes = [self.step.capacity if str(size) == "capacity" else size for size in value.shape]
                value.shape = ir.Shape(sizes)
                count += 1
        slots = [node for node in model.graph if node.op_type == "Range" and _counts_slots(node)]
        for node in slots:
            numbers = initializer(model.graph, "slots", np.arange(self.step.capacity))
            ir.convenience.replace_all_uses_with(node.outputs[0], numbers)
        return count + len(slots)


def _counts_slots(node: ir.Node) -> bool:
    """True for a ``Range`` by 1 from 0 up to the length of a cache."""
    squeeze = producer(node.inputs[1], "Squeeze")
    shape = producer(squeeze.inputs[0], "Shape") if squeeze else None
    if shape is None or not (holds(node.inputs[0], 0) and holds(node.inputs[2], 1)):
        return False
    cache = shape.inputs[0]
    is_cache = cache is not None and cache.is_graph_input() and (cache.name or "").startswith("past_")
    return is_cache and shape.attributes["start"].as_int() == _LENGTH

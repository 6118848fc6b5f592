"""Fix the capacity of caches."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.rewrite import NotApplicableError, Rewrite


class FreezeCapacity(Rewrite):
    """Fixes the capacity of caches. TensorRT updates a cache in place only if its length is fixed.

    1. The dimension ``capacity`` of inputs and outputs becomes a number.

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
        return count

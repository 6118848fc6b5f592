"""Store matrices as 8-bit floating-point numbers."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from medusa_export.graph.last_made import LastMade
from medusa_export.graph.rewrites.building import register
from medusa_export.graph.rewrites.linears import transposed_weight
from medusa_export.graph.rewrites.matching import producer
from medusa_export.graph.rewrites.rewrite import Rewrite, StepFacts
from medusa_export.graph.stored_types import note_type
from medusa_export.graph.weights import LazyWeight
from medusa_export.models.float8 import Float8Weight, round_to_float8


class StoreFloat8Weights(Rewrite):
    """Stores matrices as 8-bit floating-point numbers (e4m3), as ``StepFacts.weights`` says.

    1. A product x Wᵀ reads W from a ``DequantizeLinear`` with a scale per row of W.

    Tables and stacks of matrices keep their dtype. The count is the number of matrices.

    Precondition: Weights are those of ``StepWeights``.

    Postcondition: Matrices are read and rounded when the model is written, not before.
    """

    name = "store_float8_weights"

    def __init__(self, step: StepFacts) -> None:
        super().__init__(step)
        self._last = LastMade[Float8Weight]()

    def apply(self, model: ir.Model) -> int:
        count = 0
        for product in [node for node in model.graph if node.op_type == "MatMul"]:
            value, transpose = transposed_weight(product), producer(product.inputs[1], "Transpose")
            weight = value.const_value if value is not None else None
            if transpose is None or not isinstance(weight, LazyWeight) or len(weight.shape) != 2:
                continue
            if self.step.weights.is_float8(weight.role):
                self._store(model.graph, weight, transpose)
                count += 1
        return count

    def _store(self, graph: ir.Graph, weight: LazyWeight, transpose: ir.Node) -> None:
        """Makes the products that read a transposed matrix read it in 8 bits."""
        name, shape, kind = f"{weight.name}/fp8", ir.Shape(weight.shape.numpy()), from_torch_dtype(weight.torch_dtype)
        values = ir.LazyTensor(
            lambda: TorchTensor(self._rounded(weight).values),
            dtype=ir.DataType.FLOAT8E4M3FN,
            shape=shape,
            name=f"{name}/values",
        )
        scales = ir.LazyTensor(
            lambda: TorchTensor(self._rounded(weight).scales),
            dtype=kind,
            shape=ir.Shape([shape[0]]),
            name=f"{name}/scales",
        )
        stored = register(graph, values)
        note_type(stored, weight.role, "fp8")
        read = ir.node("DequantizeLinear", [stored, register(graph, scales)], {"axis": 0}, name=f"{name}/read")
        read.outputs[0].type, read.outputs[0].shape = ir.TensorType(kind), shape
        graph.insert_before(transpose, read)
        transpose.replace_input_with(0, read.outputs[0])

    def _rounded(self, weight: LazyWeight) -> Float8Weight:
        """A rounded matrix."""
        return self._last.get(weight.name, lambda: round_to_float8(weight.read(), weight.torch_dtype))

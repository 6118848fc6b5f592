"""Store matrices in 16 bits where the graph computes in 32."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from medusa_export.common.errors import ExportError
from medusa_export.graph.rewrites.building import Builder, register
from medusa_export.graph.rewrites.matching import replace_value
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.graph.stored_types import note_type
from medusa_export.graph.weights import PREFIX, LazyWeight
from medusa_export.models.weight_types import HalfType

_DTYPES: dict[HalfType, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


class StoreHalfWeights(Rewrite):
    """Stores matrices as fp16 or bf16, as ``StepFacts.weights`` says.

    1. A reader of a matrix reads a ``Cast`` of the stored matrix.
    2. A lookup in a table reads the stored table, and a ``Cast`` follows it.

    The count is the number of matrices.

    Precondition: Weights are those of ``StepWeights``, in fp32, and laid out as they are to be stored.

    Postcondition: Matrices are read and rounded when the model is written, not before.
    """

    name = "store_half_weights"

    def apply(self, model: ir.Model) -> int:
        count = 0
        for value in list(model.graph.initializers.values()):
            weight = value.const_value
            if not isinstance(weight, LazyWeight) or len(weight.shape) < 2:
                continue
            half = self.step.weights.half(weight.role)
            if half is not None:
                _store(model.graph, value, weight, half)
                count += 1
        return count


def _store(graph: ir.Graph, value: ir.Value, weight: LazyWeight, half: HalfType) -> None:
    kind, shape = from_torch_dtype(_DTYPES[half]), ir.Shape(weight.shape.numpy())
    read = partial(_rounded, weight, half)
    stored = register(graph, ir.LazyTensor(read, dtype=kind, shape=shape, name=f"{weight.name}/{half}"))
    note_type(stored, weight.role, "float16" if half == "fp16" else "bfloat16")
    lookups = [use.node for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
    for lookup in lookups:
        output = lookup.outputs[0]
        build = Builder(graph, f"{lookup.name}/half")
        wide = build("Cast", [output], to=int(weight.dtype))
        graph.insert_after(lookup, build.nodes)
        replace_value(output, wide)
        build.nodes[0].replace_input_with(0, output)
        lookup.replace_input_with(0, stored)
        output.type = ir.TensorType(kind)
    readers = [use.node for use in value.uses()]
    if readers:
        cast = ir.node("Cast", [stored], {"to": int(weight.dtype)}, name=f"{weight.name}/{half}/cast")
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(weight.dtype), shape
        graph.insert_before(graph[0], cast)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])


def _rounded(weight: LazyWeight, half: HalfType) -> ir.TensorProtocol:
    """The numbers of a matrix in 16 bits.

    Raises:
        ExportError: One is beyond the range of fp16.
    """
    values = weight.read().to(_DTYPES[half]).contiguous()
    if not values.isfinite().all():
        name = (weight.name or "").removeprefix(PREFIX)
        raise ExportError(
            f"The weight {name} has numbers beyond {torch.finfo(values.dtype).max:g}, the largest of {half}: store it "
            "in bf16 (`weights='bf16'`), or in the type that the bundle computes in."
        )
    return TorchTensor(values)

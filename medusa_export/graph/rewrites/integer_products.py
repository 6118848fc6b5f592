"""Round the inputs of products to 8 bits, and store their matrices as integers with one scale per output."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from medusa_export.graph.last_made import LastMade
from medusa_export.graph.rewrites.block_weights import transposes_for_products
from medusa_export.graph.rewrites.building import Builder, initializer, register
from medusa_export.graph.rewrites.matching import given
from medusa_export.graph.rewrites.rewrite import Rewrite, StepFacts
from medusa_export.graph.stored_types import note_type
from medusa_export.graph.weights import PREFIX, LazyWeight
from medusa_export.models.activations import InputRange
from medusa_export.models.blocks import BlockWeight, round_to_nearest

# Inputs that lose more than this share of their squares keep their precision: a few of their tokens have values that
# are far larger than those of the others.
_LARGEST_ERROR = 0.0015
_MIDDLE = 128
_Make = Callable[[BlockWeight], Tensor]


class QuantizeProducts(Rewrite):
    """Makes products of 8-bit integers, for matrices whose inputs have known ranges (``StepFacts.activations``).

    1. A product x Wᵀ becomes a product of x / f, rounded by ``QuantizeLinear`` and ``DequantizeLinear`` with one scale,
       and of (W · f)ᵀ, which a ``DequantizeLinear`` with one scale per output reads. f are factors of the columns.

    Other products stay as they are: those of matrices that are not stored as int8, and those whose inputs would lose
    too much. The count is the number of products.

    Precondition: Weights are those of ``StepWeights``, and stored as int8.

    Postcondition: Matrices are read and rounded when the model is written, not before.
    """

    name = "quantize_products"

    def __init__(self, step: StepFacts) -> None:
        super().__init__(step)
        self._last = LastMade[BlockWeight]()

    def apply(self, model: ir.Model) -> int:
        if self.step.activations is None:
            return 0
        count = 0
        for value in list(model.graph.initializers.values()):
            weight = value.const_value
            if not isinstance(weight, LazyWeight) or len(weight.shape) != 2:
                continue
            found, transposes = self._range(weight), transposes_for_products(value)
            if found is None or not transposes or self.step.weights.bits(weight.role) != 8:
                continue
            count += self._quantize(model.graph, weight, found, transposes)
        return count

    def _range(self, weight: LazyWeight) -> InputRange | None:
        """The range of the inputs of a matrix; None if it is not known, or too wide."""
        assert self.step.activations is not None and weight.name is not None
        names = [name.removeprefix(f"{PREFIX}model.") for name in weight.name.split("+")]
        parts = [self.step.activations.inputs.get(name) for name in names]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or any(len(part.maxima) != weight.shape.numpy()[1] for part in known):
            return None
        joined = InputRange.joined(known)
        return joined if joined.error <= _LARGEST_ERROR else None

    def _quantize(self, graph: ir.Graph, weight: LazyWeight, found: InputRange, transposes: list[ir.Node]) -> int:
        """Replaces the products of one matrix."""
        rows, columns = weight.shape.numpy()
        kind = from_torch_dtype(weight.torch_dtype)

        def part(name: str, dtype: ir.DataType, shape: tuple[int, ...], make: _Make) -> ir.Value:
            def evaluate() -> ir.TensorProtocol:
                made = self._last.get(weight.name, lambda: _per_output(weight, found))
                return TorchTensor(make(made).contiguous())

            full_name = f"{weight.name}/int8/{name}"
            return register(graph, ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=full_name))

        values = part("columns", ir.DataType.INT8, (columns, rows), lambda made: (made.values.int() - _MIDDLE).char().T)
        note_type(values, weight.role, "int8")
        scales = part("column_scales", kind, (rows,), lambda made: made.scales[:, 0])
        read = ir.node("DequantizeLinear", [values, scales], {"axis": 1}, name=f"{weight.name}/dequantize")
        read.outputs[0].type, read.outputs[0].shape = scales.type, ir.Shape((columns, rows))
        graph.insert_before(transposes[0], read)
        products = [use.node for node in transposes for use in node.outputs[0].uses()]
        for product in products:
            source = given(product.inputs[0])
            product.replace_input_with(0, self._rounded_input(graph, product, source, weight, found))
            product.replace_input_with(1, read.outputs[0])
        return len(products)

    def _rounded_input(
        self, graph: ir.Graph, product: ir.Node, source: ir.Value, weight: LazyWeight, found: InputRange
    ) -> ir.Value:
        """Makes the nodes that divide an input by its factors and round it."""
        kind = from_torch_dtype(weight.torch_dtype).numpy()
        build = Builder(graph, f"{product.name}/input")
        inverse = initializer(graph, f"{weight.name}/input/inverse_factors", (1 / found.factors).numpy().astype(kind))
        scale = initializer(graph, f"{weight.name}/input/scale", np.array(found.scale, kind))
        middle = initializer(graph, "middle/uint8", np.array(_MIDDLE, np.uint8))
        scaled = build("Mul", [source, inverse])
        rounded = build("QuantizeLinear", [scaled, scale, middle])
        result = build("DequantizeLinear", [rounded, scale, middle])
        for value in (scaled, result):
            value.type, value.shape = source.type, source.shape
        rounded.type, rounded.shape = ir.TensorType(ir.DataType.UINT8), source.shape
        graph.insert_before(product, build.nodes)
        return result


def _per_output(weight: LazyWeight, found: InputRange) -> BlockWeight:
    """W · f with one scale per output."""
    scaled = weight.read().float() * found.factors
    return round_to_nearest(scaled, 8, scaled.shape[1], symmetric=True, dtype=weight.torch_dtype)

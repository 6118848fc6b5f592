"""The products of a bundle that round their inputs to 8 bits, for the reference to compute with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from medusa_export.graph.rewrites.matching import given, producer
from medusa_export.graph.weights import weights_in
from medusa_runtime.bundles.bundle import Bundle

_LEAST, _MOST = -128, 127


@dataclass(frozen=True)
class IntegerProduct:
    """A product with a matrix of 8-bit integers.

    Attributes:
        weights: The names in the step of the weights that the matrix holds, one above the other.
        matrix: The matrix, [N, K], without the factors of its columns.
        steps: The step in which each column of the input is rounded, [K].
    """

    weights: tuple[str, ...]
    matrix: Tensor
    steps: Tensor


def integer_products(bundle: Bundle) -> Iterator[IntegerProduct]:
    """Reads the matrices of such products in a bundle's standard graph, one at a time."""
    seen: set[str | None] = set()
    for node in ir.load(bundle.graph).graph:
        rounded, matrix = (
            (producer(value, "DequantizeLinear") for value in node.inputs) if node.op_type == "MatMul" else (None, None)
        )
        if rounded is None or matrix is None or given(matrix.inputs[0]).name in seen:
            continue
        values, scales = (given(value) for value in matrix.inputs[:2])
        seen.add(values.name)
        quantize = producer(rounded.inputs[0], "QuantizeLinear")
        scaled = producer(quantize.inputs[0], "Mul") if quantize is not None else None
        assert scaled is not None and values.name is not None
        inverse = _values(given(scaled.inputs[1]))
        stored = _values(values).T * _values(scales)[:, None]
        yield IntegerProduct(
            weights_in(values.name.rpartition("/int8")[0]),
            stored * inverse,
            _values(given(rounded.inputs[1])) / inverse,
        )


def round_inputs(module: nn.Module, steps: Tensor) -> None:
    """Makes a linear layer round its input, as the product of the bundle does."""

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((given[0] / steps).round().clamp(_LEAST, _MOST) * steps, *given[1:])

    module.register_forward_pre_hook(hook)


def _values(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().copy()).float()

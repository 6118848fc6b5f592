"""Store matrices in blocks of integers as TensorRT reads them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder, initializer, register
from medusa_export.graph.rewrites.matching import given, only_user, producer, rank_of, replace, replace_value
from medusa_export.graph.rewrites.rewrite import Rewrite

_FLIP = np.uint8(0x88)
_MIDDLES = {4: 8, 8: 128}


class SignBlockWeights(Rewrite):
    """Turns matrices in blocks of integers into the form that TensorRT reads fast: signed 4-bit integers.

    1. ``DequantizeLinear`` of unsigned 4-bit integers with zero points z in the middle m of the range becomes one of
       signed integers without zero points. TensorRT has no unsigned types of weights.
    2. With other zero points, x Wᵀ becomes x Uᵀ + b Cᵀ. U is W with zero points in the middle, b are the sums of x over
       each block of columns, and C = (m - z) · scale. TensorRT takes no other zero points.
    3. A matrix of 8-bit integers becomes one of the graph's dtype, with the same numbers. TensorRT would write it out
       in that dtype in each step.
    4. So does a table of 8-bit integers. TensorRT gathers no integers of weights.

    Integers are read when the rewrite runs, one matrix at a time.
    """

    name = "sign_block_weights"

    def apply(self, model: ir.Model) -> int:
        graph = model.graph
        lookups = [node for node in graph if node.op_type == "Gather" and _is_stored_as(node.inputs[0], 8)]
        count = sum(_look_up_floats(graph, node) for node in lookups)
        for read in [node for node in graph if node.op_type == "DequantizeLinear"]:
            if _is_stored_as(read.inputs[0], 4):
                _sign(graph, read)
            elif _is_stored_as(read.inputs[0], 8):
                numbers = _dequantized(graph, given(read.inputs[0]), given(read.inputs[1]))
                ir.convenience.replace_all_uses_with(read.outputs[0], numbers)
            else:
                continue
            count += 1
        return count


def _is_stored_as(value: ir.Value | None, bits: int) -> bool:
    kind = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}[bits]
    return value is not None and value.is_initializer() and value.dtype == kind


def _sign(graph: ir.Graph, read: ir.Node) -> None:
    """Makes one ``DequantizeLinear`` read signed integers."""
    values, zero_points = given(read.inputs[0]), given(read.inputs[2])
    offsets = _MIDDLES[4] - _stored(zero_points).numpy().astype(np.int32)
    if offsets.any():
        _add_zero_points(graph, read, offsets)
    read.replace_input_with(0, _signed(graph, values))
    read.resize_inputs(2)


def _signed(graph: ir.Graph, values: ir.Value) -> ir.Value:
    """The 4-bit values minus the middle of their range, as signed integers."""
    name, stored = f"{values.name}/signed", _stored(values)
    if name not in graph.initializers:
        flipped = np.frombuffer(stored.tobytes(), np.uint8) ^ _FLIP  # the highest bit of each value
        register(graph, ir.PackedTensor(flipped, ir.DataType.INT4, shape=stored.shape.numpy(), name=name))
    return graph.initializers[name]


def _dequantized(graph: ir.Graph, values: ir.Value, scales: ir.Value) -> ir.Value:
    """A matrix or table of 8-bit values as numbers of the dtype of its scales."""
    name = f"{values.name}/dequantized"
    if name not in graph.initializers:
        integers, factors = _stored(values).numpy(), _stored(scales).numpy()[..., None]
        blocks = (integers.astype(np.int16) - _MIDDLES[8]).reshape(*factors.shape[:2], -1)
        numbers = (blocks.astype(factors.dtype) * factors).reshape(integers.shape)
        register(graph, ir.Tensor(numbers, dtype=scales.dtype, name=name))
    return graph.initializers[name]


def _add_zero_points(graph: ir.Graph, read: ir.Node, offsets: np.ndarray) -> None:
    """Adds the zero points' share to all products with a matrix.

    Args:
        graph: The graph.
        read: The ``DequantizeLinear`` of the matrix.
        offsets: m - z of each block, [N, blocks].
    """
    scales, block = _stored(given(read.inputs[1])).numpy(), read.attributes["block_size"].as_int()
    name = f"{read.name}/zero_points"
    shares = initializer(graph, name, np.ascontiguousarray((offsets.astype(scales.dtype) * scales).T))
    last = initializer(graph, "last_axis", np.array([-1], np.int64))
    products = [use.node for turned in read.outputs[0].uses() for use in turned.node.outputs[0].uses()]
    for product in products:
        source, result = given(product.inputs[0]), product.outputs[0]
        rank = _rank(source)
        assert rank is not None and product.op_type == "MatMul"
        blocks = offsets.shape[1]
        axes = np.array([0] * (rank - 1) + [blocks, block], np.int64)  # -1 would fail where there are no rows
        shape = initializer(graph, f"{blocks}_blocks_of_{block}/{rank}", axes)
        add = Builder(graph, f"{product.name}/zero_points")
        sums = add("ReduceSum", [add("Reshape", [source, shape]), last], keepdims=0)
        whole = add("Add", [result, add("MatMul", [sums, shares])])
        graph.insert_after(product, add.nodes)
        replace_value(result, whole)
        add.nodes[-1].replace_input_with(0, result)  # the line above replaced this use too
        result.type, result.shape = whole.type, whole.shape


def _rank(source: ir.Value) -> int | None:
    """The number of axes of a product's source. The sources of a stack's products have no shape of their own."""
    if (split := producer(source, "Split")) is not None:
        return rank_of(given(split.inputs[0]))
    if (added := producer(source, "Unsqueeze")) is not None and source.shape is None:
        below = rank_of(given(added.inputs[0]))
        return None if below is None else below + 1
    return rank_of(source)


def _look_up_floats(graph: ir.Graph, lookup: ir.Node) -> bool:
    """Replaces one lookup of integers and scales; False if the lookup is not that of ``QuantizeWeights``."""
    chain = [lookup]
    for kind in ("Cast", "Sub", "Reshape", "Mul", "Reshape"):
        user = only_user(chain[-1].outputs[0])
        if user is None or user.op_type != kind:
            return False
        chain.append(user)
    scaled = producer(chain[4].inputs[1], "Unsqueeze")
    scale_lookup = producer(scaled.inputs[0], "Gather") if scaled else None
    if scale_lookup is None:
        return False
    table = _dequantized(graph, given(lookup.inputs[0]), given(scale_lookup.inputs[0]))
    replace(chain[-1].outputs[0], [ir.node("Gather", [table, lookup.inputs[1]], {"axis": 0}, name=lookup.name)])
    return True


def _stored(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value

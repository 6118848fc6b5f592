"""Multiply by matrices in blocks of integers without making them floating-point numbers first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import initializer
from medusa_export.graph.rewrites.matching import given, producer, replace_value
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.constants import CONTRIB

# Activations are rounded to 8 bits, in blocks of their own. Higher precision takes two to four times as long.
_ACCURACY_LEVEL = 4


class FuseBlockWeights(Rewrite):
    """Makes one ``MatMulNBits`` of a product with a matrix in blocks.

    1. x Wᵀ becomes ``MatMulNBits``, where a ``DequantizeLinear`` with blocks along its columns computes W.

    It reads the same bytes of the file of weights. There they are integers [N, K], here bytes [N, K / block_size, …].
    Zero points in the middle of the range are left out, because the operator assumes them.

    Precondition: Matrices are those of ``QuantizeWeights``, in the file of weights.
    """

    name = "fuse_block_weights"

    def apply(self, model: ir.Model) -> int:
        count = 0
        for node in [node for node in model.graph if node.op_type == "MatMul"]:
            transpose = producer(node.inputs[1], "Transpose")
            read = producer(transpose.inputs[0], "DequantizeLinear") if transpose is not None else None
            if read is None or "block_size" not in read.attributes:
                continue
            _fuse(model.graph, node, read)
            count += 1
        return count


def _fuse(graph: ir.Graph, product: ir.Node, read: ir.Node) -> None:
    """Replaces one product."""
    values, scales, zero_points = (given(value) for value in read.inputs)
    integers = values.const_value
    assert integers is not None
    (rows, columns), bits, block = (
        integers.shape.numpy(),
        integers.dtype.bitwidth,
        read.attributes["block_size"].as_int(),
    )
    blocks = columns // block
    inputs = [product.inputs[0], _as_bytes(graph, values, (rows, blocks, block * bits // 8)), scales]
    if not _in_the_middle(zero_points, bits):
        inputs.append(_packed_rows(graph, zero_points, rows, blocks, bits))
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": _ACCURACY_LEVEL}
    fused = ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB, name=product.name)
    graph.insert_before(product, fused)
    replace_value(product.outputs[0], fused.outputs[0])


def _as_bytes(graph: ir.Graph, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    """The bytes of an initializer, as one of type uint8."""
    name, stored = f"{value.name}/bytes", value.const_value
    if name in graph.initializers:
        return graph.initializers[name]
    if not isinstance(stored, ir.ExternalTensor):  # a small one, within the graph's file
        assert stored is not None
        return initializer(graph, name, np.frombuffer(stored.tobytes(), np.uint8).reshape(shape))
    tensor = ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        ir.DataType.UINT8,
        shape=ir.Shape(shape),
        name=name,
        base_dir=stored.base_dir,
    )
    alias = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(alias)
    return alias


def _in_the_middle(zero_points: ir.Value, bits: int) -> bool:
    stored = zero_points.const_value
    assert stored is not None
    return bool((stored.numpy().astype(np.int32) == 1 << (bits - 1)).all())


def _packed_rows(graph: ir.Graph, zero_points: ir.Value, rows: int, blocks: int, bits: int) -> ir.Value:
    """Zero points as the operator takes them: each row begins with a byte of its own."""
    if bits == 8 or blocks % 2 == 0:
        return _as_bytes(graph, zero_points, (rows, blocks * bits // 8))
    stored = zero_points.const_value
    assert stored is not None
    padded = np.pad(stored.numpy().astype(np.uint8), ((0, 0), (0, 1)))
    return initializer(graph, f"{zero_points.name}/rows", padded[:, ::2] | padded[:, 1::2] << 4)

"""Store matrices as integers of 4 or 8 bits, in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from medusa_export.graph.last_made import LastMade
from medusa_export.graph.rewrites.building import Builder, initializer, register
from medusa_export.graph.rewrites.matching import given, rank_of, replace, replace_value, shape_of
from medusa_export.graph.rewrites.rewrite import Rewrite, StepFacts
from medusa_export.graph.stored_types import note_type
from medusa_export.graph.weights import LazyWeight
from medusa_export.models.blocks import Bits, BlockWeight, pack, round_to_nearest
from medusa_export.models.packed import StoredBlocks

_TYPES = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
# The end of the name of a matrix's offsets.
OFFSETS = "offsets"
# The start of the names of matrices that sum the columns of each block.
BLOCK_SUMS = "block_sums"
_Make = Callable[[BlockWeight], ir.TensorProtocol]


class _Parts(NamedTuple):
    """The initializers of a matrix [N, K] in blocks.

    Attributes:
        block_size: Columns per block.
        values: [N, K] unsigned integers.
        scales: [N, K / block_size].
        zero_points: [N, K / block_size] unsigned integers.
        offsets: [K / block_size, N], as ``MatMul`` reads them; None if there are none.
    """

    block_size: int
    values: ir.Value
    scales: ir.Value
    zero_points: ir.Value
    offsets: ir.Value | None = None


class QuantizeWeights(Rewrite):
    """Stores matrices in blocks of integers, as ``StepFacts.weights`` says.

    1. A product x Wᵀ reads W from a ``DequantizeLinear`` with blocks along its columns.
    2. A product with a stack of matrices [K, C, N] becomes K products x Wᵀ, and a ``Concat``.
    3. If the blocks of W have offsets, x Wᵀ becomes the sum of two products: x with the blocks without their offsets,
       and the sums of x over each block with the offsets.
    4. A lookup in a table gathers the integers and the scales of its rows, and multiplies them.

    Matrices that their file holds in such blocks are stored as they are. So are matrices that it holds in 8 bits where
    4 are asked for, in parts that are not ``narrowed``. Others are rounded, and so are blocks with zero points or
    offsets if ``WeightTypes`` does not keep these. Matrices whose columns no block size divides keep their dtype. 8-bit
    matrices have no zero points of their own, and tables are of 8 bits. The count is the number of products and
    lookups.

    Precondition: Weights are those of ``StepWeights``.

    Postcondition: Matrices are read and rounded when the model is written, not before.
    """

    name = "quantize_weights"

    def __init__(self, step: StepFacts) -> None:
        super().__init__(step)
        self._made: dict[tuple[str | None, Bits], _Parts] = {}
        self._last = LastMade[BlockWeight]()
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}

    def apply(self, model: ir.Model) -> int:
        count = 0
        for value in list(model.graph.initializers.values()):
            weight = value.const_value
            if not isinstance(weight, LazyWeight):
                continue
            if len(weight.shape) == 3 and self._is_stored(weight):
                for product in _products_with_stacks(value):
                    count += self._unstack(model.graph, product, weight)
            if len(weight.shape) != 2:
                continue
            lookups = [use.node for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
            transposes = transposes_for_products(value)
            if weight.is_table and lookups and (bits := self.step.weights.bits("embeddings")):
                count += self._store_table(model.graph, weight, bits, lookups)
            if transposes and (bits := self._bits(weight)):
                count += self._store_matrix(model.graph, weight, bits, transposes)
        return count

    def _is_stored(self, stack: LazyWeight) -> bool:
        columns = stack.shape.numpy()[1]
        return self.step.weights.bits(stack.role) is not None and self.step.weights.block_for(columns) is not None

    def _unstack(self, graph: ir.Graph, product: ir.Node, stack: LazyWeight) -> int:
        """Replaces a product with a stack of matrices by one product for each."""
        bits = self.step.weights.bits(stack.role)
        source, (depth, columns, rows) = given(product.inputs[0]), stack.shape.numpy()
        assert bits is not None
        build = Builder(graph, product.name or "")
        if rank_of(source) == 3:
            split = ir.node("Split", [source], {"axis": 0, "num_outputs": depth}, num_outputs=depth)
            build.nodes.append(split)
            sources = list(split.outputs)
        else:
            sources = [build("Unsqueeze", [source, initializer(graph, "stack/first", np.array([0]))])] * depth
        transposes, products = [], []
        for index, own in enumerate(sources):
            matrix = LazyWeight(
                f"{stack.name}[{index}]", partial(_turned, stack, index), (rows, columns), stack.torch_dtype, stack.role
            )
            turned = build("Transpose", [register(graph, matrix)], perm=[1, 0])
            transposes.append((matrix, given(turned).producer()))
            products.append(build("MatMul", [own, turned]))
        build("Concat", products, axis=0)
        replace(product.outputs[0], build.nodes)
        return sum(self._store_matrix(graph, matrix, bits, [node]) for matrix, node in transposes if node is not None)

    def _bits(self, weight: LazyWeight) -> Bits | None:
        """The bits per value of a matrix that products read; None if it keeps its dtype."""
        types, columns = self.step.weights, weight.shape.numpy()[1]
        bits, size = types.bits(weight.role), types.block_for(columns)
        if bits != 4 or size is None or weight.role in types.narrowed:
            return bits
        return bits if _exact_blocks(weight, 8, size, keep_zero_points=True) is None else 8

    def _store_matrix(self, graph: ir.Graph, weight: LazyWeight, bits: Bits, transposes: list[ir.Node]) -> int:
        """Makes products read a matrix in blocks."""
        parts = self._parts(graph, weight, bits)
        if parts is None:
            return 0
        read = ir.node(
            "DequantizeLinear",
            [parts.values, parts.scales, parts.zero_points],
            {"axis": 1, "block_size": parts.block_size},
            name=f"{weight.name}/dequantize",
        )
        read.outputs[0].type, read.outputs[0].shape = parts.scales.type, ir.Shape(weight.shape.numpy())
        graph.insert_before(transposes[0], read)
        for transpose in transposes:
            transpose.replace_input_with(0, read.outputs[0])
            if parts.offsets is not None:
                for product in [use.node for use in transpose.outputs[0].uses()]:
                    self._add_offsets(graph, product, parts.offsets, parts.block_size)
        return len(transposes)

    def _add_offsets(self, graph: ir.Graph, product: ir.Node, offsets: ir.Value, block_size: int) -> None:
        """Adds to a product the sums of its input over each block, multiplied by the offsets of the blocks."""
        given_input, output = given(product.inputs[0]), product.outputs[0]
        build = Builder(graph, f"{product.name}/offsets")
        key = (given_input, block_size)
        if key not in self._sums:
            # A product has the same bits for any number of rows, which a sum by vector lanes may not have.
            self._sums[key] = build("MatMul", [given_input, _block_sums(graph, offsets, block_size)])
        added = build("Add", [output, build("MatMul", [self._sums[key], offsets])])
        graph.insert_after(product, build.nodes)
        replace_value(output, added)
        build.nodes[-1].replace_input_with(0, output)

    def _store_table(self, graph: ir.Graph, weight: LazyWeight, bits: Bits, lookups: list[ir.Node]) -> int:
        """Makes lookups read a table in blocks. No operator gathers 4-bit values."""
        assert bits == 8
        parts = self._parts(graph, weight, bits)
        if parts is None:
            return 0
        kind = from_torch_dtype(weight.torch_dtype)
        middle = initializer(graph, "table/middle", np.array(1 << (bits - 1), kind.numpy()))
        grouped_by = initializer(graph, "table/grouped", np.array([0, 0, -1, parts.block_size]))
        last = initializer(graph, "table/last", np.array([-1]))
        flat = initializer(graph, "table/flat", np.array([0, 0, -1]))
        for lookup in lookups:
            build = Builder(graph, f"{lookup.name}/blocks")
            rows, scales = (
                build("Gather", [part, given(lookup.inputs[1])], axis=0) for part in (parts.values, parts.scales)
            )
            grouped = build("Reshape", [build("Sub", [build("Cast", [rows], to=kind), middle]), grouped_by])
            scaled = build("Mul", [grouped, build("Unsqueeze", [scales, last])])
            whole = build("Reshape", [scaled, flat])
            graph.insert_before(lookup, build.nodes)
            replace_value(lookup.outputs[0], whole)
        return len(lookups)

    def _parts(self, graph: ir.Graph, weight: LazyWeight, bits: Bits) -> _Parts | None:
        """The initializers of a matrix in blocks; None if no block size fits. A tied matrix may be asked for twice."""
        known = self._made.get((weight.name, bits))
        if known is not None:
            return known
        rows, columns = weight.shape.numpy()
        size = self.step.weights.block_for(columns)
        if size is None:
            return None
        exact = self._exact_blocks(weight, bits, size)
        symmetric = self.step.weights.symmetric or bits == 8 if exact is None else not exact.has_zero_points
        shape = (rows, columns // size)
        has_offsets = exact is not None and exact.has_offsets

        def in_blocks() -> BlockWeight:
            if exact is not None:
                return exact.read().split(size, weight.torch_dtype)
            return round_to_nearest(weight.read(), bits, size, symmetric=symmetric, dtype=weight.torch_dtype)

        def part(name: str, kind: ir.DataType, shape: tuple[int, int], make: _Make) -> ir.Value:
            def evaluate() -> ir.TensorProtocol:
                return make(self._last.get((weight.name, bits), in_blocks))

            full_name = f"{weight.name}/int{bits}/{name}"
            return register(graph, ir.LazyTensor(evaluate, dtype=kind, shape=ir.Shape(shape), name=full_name))

        scale_type = from_torch_dtype(weight.torch_dtype)
        self._made[weight.name, bits] = parts = _Parts(
            size,
            part(
                "values", _TYPES[bits], (rows, columns), lambda made: _integers(made.packed(), made.values.shape, bits)
            ),
            part("scales", scale_type, shape, lambda made: TorchTensor(made.scales)),
            _middles(graph, shape, bits) if symmetric else part("zero_points", _TYPES[bits], shape, _zero_points),
            part(OFFSETS, scale_type, shape[::-1], _offsets) if has_offsets else None,
        )
        note_type(
            parts.values,
            weight.role,
            "int4" if bits == 4 else "int8",
            block_size=size,
            has_zero_points=not symmetric,
            has_offsets=has_offsets,
        )
        return parts

    def _exact_blocks(self, weight: LazyWeight, bits: Bits, block_size: int) -> StoredBlocks | None:
        return _exact_blocks(weight, bits, block_size, keep_zero_points=self.step.weights.keep_zero_points)


def _exact_blocks(weight: LazyWeight, bits: Bits, block_size: int, *, keep_zero_points: bool) -> StoredBlocks | None:
    """A weight as its file holds it, if blocks of these bits and this size hold it; else None."""
    stored = weight.blocks
    if stored is None or not stored.fit(bits, block_size) or (bits == 8 and stored.has_zero_points):
        return None
    if not keep_zero_points and (stored.has_zero_points or stored.has_offsets):
        return None
    return None if stored.has_offsets and weight.is_table else stored


def _integers(packed: Tensor, shape: Sequence[int], bits: Bits) -> ir.TensorProtocol:
    """A tensor of unsigned integers from bytes that hold them."""
    if bits == 8:
        return TorchTensor(packed.contiguous())
    return ir.PackedTensor(packed.flatten().numpy(), _TYPES[bits], shape=shape)


def _block_sums(graph: ir.Graph, offsets: ir.Value, block_size: int) -> ir.Value:
    """The matrix [K, K / block_size] that sums the columns of each block."""
    blocks, kind = shape_of(offsets).numpy()[0], offsets.dtype
    assert kind is not None
    ones = np.repeat(np.eye(blocks, dtype=kind.numpy()), block_size, axis=0)
    return initializer(graph, f"{BLOCK_SUMS}/{blocks}x{block_size}", ones)


def _offsets(made: BlockWeight) -> ir.TensorProtocol:
    assert made.offsets is not None
    return TorchTensor(made.offsets.T.contiguous())


def _zero_points(made: BlockWeight) -> ir.TensorProtocol:
    assert made.zero_points is not None
    flat = made.zero_points.flatten()
    packed = flat if made.bits == 8 else pack(torch.nn.functional.pad(flat, (0, len(flat) % 2))[None])[0]
    return _integers(packed, made.zero_points.shape, made.bits)


def _middles(graph: ir.Graph, shape: tuple[int, int], bits: Bits) -> ir.Value:
    """Zero points in the middle of the range, which all matrices of a shape share."""
    name = f"middle/int{bits}/{shape[0]}x{shape[1]}"
    if name in graph.initializers:
        return graph.initializers[name]
    byte = 128 if bits == 8 else 0x88
    count = math.prod(shape) if bits == 8 else -(-math.prod(shape) // 2)

    def evaluate() -> ir.TensorProtocol:
        return _integers(torch.full((count,), byte, dtype=torch.uint8).view(shape if bits == 8 else -1), shape, bits)

    return register(graph, ir.LazyTensor(evaluate, dtype=_TYPES[bits], shape=ir.Shape(shape), name=name))


def _turned(stack: LazyWeight, index: int) -> Tensor:
    return stack.read()[index].T


def _products_with_stacks(value: ir.Value) -> list[ir.Node]:
    """The products of a stack of matrices; an empty list if anything else reads it."""
    uses = list(value.uses())
    return [use.node for use in uses] if all(use.node.op_type == "MatMul" and use.idx == 1 for use in uses) else []


def transposes_for_products(value: ir.Value) -> list[ir.Node]:
    """The transposes of a matrix that only products x Wᵀ read."""
    transposes = [use.node for use in value.uses() if use.node.op_type == "Transpose"]
    return [
        node
        for node in transposes
        if all(use.node.op_type == "MatMul" and use.idx == 1 for use in node.outputs[0].uses())
    ]

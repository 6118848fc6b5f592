"""The matrices that a bundle stores in other types than its own, for the reference to compute with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from medusa_export.graph.rewrites.block_weights import OFFSETS
from medusa_export.graph.rewrites.matching import given
from medusa_export.graph.weights import TURNED, weights_in
from medusa_export.models.blocks import BlockWeight
from medusa_export.models.float8 import FLOAT8, Float8Weight
from medusa_export.step.step import MedusaStep
from medusa_export.verification.checks import Check
from medusa_export.verification.integer_products import integer_products, round_inputs
from medusa_runtime.bundles.bundle import Bundle

CHECK = "stored weights"
# Largest distance between a matrix and the stored one, as a share of the matrix's norm: of integers by their bits, and
# of floating-point numbers of 8 and 16 bits. Rounding takes 0.1, 0.006, 0.03 and 0.002; rows in another order take 1.4.
_LARGEST_ERROR, _LARGEST_FLOAT8_ERROR, _LARGEST_HALF_ERROR = {4: 0.3, 8: 0.03}, 0.1, 0.005
_MAX_NOTES = 5
# Ends of the names of matrices in 16 bits.
_HALVES = ("/fp16", "/bf16")


@dataclass(frozen=True)
class HalfWeight:
    """A matrix, or a stack of matrices, in fp16 or bf16.

    Attributes:
        values: The matrix in the layout of the model.
    """

    values: Tensor

    def dequantized(self) -> Tensor:
        """The matrix in fp32."""
        return self.values.float()


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in a bundle: in blocks of integers, of 8-bit floating-point numbers, or in 16 bits.

    Attributes:
        weights: The names in the step of the weights that it holds, one above the other.
        is_table: Rows are looked up in it. Otherwise it is multiplied with.
        blocks: The matrix.
    """

    weights: tuple[str, ...]
    is_table: bool
    blocks: BlockWeight | Float8Weight | HalfWeight

    @property
    def largest_error(self) -> float:
        """The largest distance from the matrix that was stored, as a share of its norm."""
        if isinstance(self.blocks, BlockWeight):
            return _LARGEST_ERROR[self.blocks.bits]
        return _LARGEST_FLOAT8_ERROR if isinstance(self.blocks, Float8Weight) else _LARGEST_HALF_ERROR


def stored_matrices(bundle: Bundle) -> Iterator[StoredMatrix]:
    """Reads the matrices of a bundle's standard graph that are not in the bundle's dtype, one at a time."""
    graph = ir.load(bundle.graph).graph
    for node in graph:
        found = _half_matrix(node) or _float8_matrix(node) or _block_matrix(node, graph)
        if found is not None:
            yield found


def _block_matrix(node: ir.Node, graph: ir.Graph) -> StoredMatrix | None:
    """The matrix that a node reads in blocks of integers; None for any other node."""
    source = node.inputs[0] if node.inputs else None
    if source is None or source.const_value is None or source.name is None:
        return None
    stem = source.name.rpartition("/")[0]
    is_table = node.op_type == "Gather" and source.dtype == ir.DataType.UINT8
    if is_table:
        zeros, scales = None, graph.initializers[f"{stem}/scales"].const_value
    elif node.op_type == "DequantizeLinear" and "block_size" in node.attributes:
        scales, zeros = (given(value).const_value for value in node.inputs[1:3])
    else:
        return None
    assert scales is not None
    integers, steps = _tensor(source.const_value).to(torch.uint8), _tensor(scales).float()
    moved = graph.initializers.get(f"{stem}/{OFFSETS}")
    blocks = BlockWeight(
        4 if source.const_value.dtype.bitwidth == 4 else 8,
        integers.shape[1] // steps.shape[1],
        integers,
        steps,
        None if zeros is None else _tensor(zeros).to(torch.uint8),
        None if moved is None or moved.const_value is None else _tensor(moved.const_value).float().T,
    )
    return StoredMatrix(weights_in(source.name.rpartition("/int")[0]), is_table, blocks)


def _float8_matrix(node: ir.Node) -> StoredMatrix | None:
    """The matrix that a node reads in 8-bit floating-point numbers; None for any other node."""
    if node.op_type != "DequantizeLinear" or given(node.inputs[0]).dtype != ir.DataType.FLOAT8E4M3FN:
        return None
    values, scales = (given(value).const_value for value in node.inputs[:2])
    assert values is not None and values.name is not None and scales is not None
    numbers = torch.from_numpy(values.numpy().view(np.uint8).copy()).view(FLOAT8)
    weights = weights_in(values.name.rpartition("/fp8")[0])
    return StoredMatrix(weights, False, Float8Weight(numbers, _tensor(scales).float()))


def _half_matrix(node: ir.Node) -> StoredMatrix | None:
    """The matrix that a node reads in 16 bits, and that a ``Cast`` makes fp32; None for any other node."""
    value = node.inputs[0] if node.op_type in ("Cast", "Gather") else None
    if value is None or value.const_value is None or not (value.name or "").endswith(_HALVES):
        return None
    stem, values = (value.name or "").rpartition("/")[0], _tensor(value.const_value)
    # A weight that products read is stored transposed.
    in_layout = values.T if stem.endswith(TURNED) else values
    return StoredMatrix(weights_in(stem.removesuffix(TURNED)), node.op_type == "Gather", HalfWeight(in_layout))


def stored_bits(bundle: Bundle) -> float | None:
    """The bits per value of the matrices that a bundle's products read, on average; None if all have its dtype."""
    sizes = {
        values.name: (values.dtype.bitwidth, math.prod(values.shape.numpy()))
        for node in ir.load(bundle.graph).graph
        if node.op_type in ("DequantizeLinear", "Cast") and node.inputs[0] is not None
        for values in [node.inputs[0]]
        if (node.op_type == "DequantizeLinear" or (values.name or "").endswith(_HALVES))
        if values.dtype is not None and values.shape is not None
    }
    total = sum(size for _, size in sizes.values())
    return sum(bits * size for bits, size in sizes.values()) / total if total else None


def use_stored_matrices(step: MedusaStep, bundle: Bundle) -> Check:
    """Gives a step the matrices that a bundle stores in other types, and compares them with those that it had.

    Args:
        step: The reference, computing in fp32. Embeddings and ``lm_head`` that are tied may get values of their own.
        bundle: The bundle.
    """
    check = Check(CHECK, figures={"largest_error": 0.0})
    seen: set[tuple[str, bool]] = set()
    for stored in stored_matrices(bundle):
        start, values = 0, stored.blocks.dequantized()
        for name in stored.weights:
            if (name, stored.is_table) in seen:
                continue
            seen.add((name, stored.is_table))
            original, store = _place(step, name, stored.is_table)
            part = values[start : start + len(original)]
            start += len(original)
            _compare(check, name, original, part, stored.largest_error)
            store(part)
    for product in integer_products(bundle):
        start = 0
        for name in product.weights:
            original, store = _place(step, name, is_table=False)
            part = product.matrix[start : start + len(original)]
            start += len(original)
            _compare(check, name, original, part, _LARGEST_ERROR[8])
            store(part)
            round_inputs(_owner(step, name, is_table=False)[0], product.steps)
    return check


def _place(step: MedusaStep, name: str, is_table: bool) -> tuple[Tensor, Callable[[Tensor], object]]:
    """The values of a matrix in a step, and the function that replaces them.

    Args:
        step: The step.
        name: The name of a weight, of a weight with ``.T`` if the matrix is its transpose, of a matrix Wᵀ in a stack of
            them, such as ``heads.layers.0.weight[2]``, or of a matrix W in a stack of them, such as
            ``experts.down_proj.2``. ``w2[2of8]`` is in a stack of 8 that is stored as one matrix.
        is_table: Rows are looked up in it.
    """
    if name.endswith(TURNED):
        untransposed = step.get_parameter(name.removesuffix(TURNED)).detach()
        return untransposed.T, lambda values: untransposed.copy_(values.T)
    stack, _, index = name.removesuffix("]").partition("[")
    if index:
        stored = _in_stack(step.get_parameter(stack), index)
        return stored.T, lambda values: stored.copy_(values.T)
    stack, _, index = name.rpartition(".")
    if index[:1].isdigit() and stack in dict(step.named_parameters()):
        matrix = _in_stack(step.get_parameter(stack), index)
        return matrix, matrix.copy_
    module, attribute = _owner(step, name, is_table)
    weight = getattr(module, attribute)
    if (
        weight is not step.model.get_output_embeddings().weight
        or weight is not step.model.get_input_embeddings().weight
    ):
        return weight.detach(), weight.detach().copy_
    # Of a tied weight, lookups and products may read different numbers.
    return weight.detach(), lambda values: setattr(module, attribute, nn.Parameter(values.clone(), requires_grad=False))


def _in_stack(weight: Tensor, place: str) -> Tensor:
    """A matrix of a stack. The place names the number of matrices, too, if they are stored as one."""
    index, _, count = place.partition("of")
    stack = weight.detach()
    return (stack.view(int(count), -1, stack.shape[-1]) if count else stack)[int(index)]


def _owner(step: MedusaStep, name: str, is_table: bool) -> tuple[nn.Module, str]:
    """The module that uses a weight, and the weight's name in it. A tied weight is used by two."""
    weight = step.get_parameter(name)
    lm_head, embeddings = step.model.get_output_embeddings(), step.model.get_input_embeddings()
    if is_table:
        return embeddings, "weight"
    if lm_head.weight is weight or weight is embeddings.weight:
        return lm_head, "weight"
    module, _, attribute = name.rpartition(".")
    return step.get_submodule(module), attribute


def _compare(check: Check, name: str, original: Tensor, stored: Tensor, largest_error: float) -> None:
    check.compared += original.numel()
    same_shape = original.shape == stored.shape
    error = float((original - stored).norm() / original.norm().clamp(min=1e-30)) if same_shape else float("inf")
    check.figures["largest_error"] = float(np.maximum(check.figures["largest_error"], error))
    if not error <= largest_error:  # NaN fails, too
        check.mismatches += original.numel()
        if len(check.notes) < _MAX_NOTES:
            check.notes.append(f"{name} is {error:.2g} of its norm away from the one that the bundle stores")


def _tensor(stored: ir.TensorProtocol) -> Tensor:
    array = stored.numpy()
    if stored.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(array.astype(np.uint8) if stored.dtype.bitwidth <= 8 else np.array(array))

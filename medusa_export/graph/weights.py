"""The weights of a step as tensors of a graph. Each is read when the graph is written, and then dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor, nn

from medusa_export.models.blocks import BlockWeight
from medusa_export.models.checkpoint import Readers, readers_by_weight
from medusa_export.models.packed import StoredBlocks
from medusa_export.models.weight_types import Role
from medusa_export.step.step import MedusaStep

# Traced graphs name a weight of the step by its name in the step behind this.
PREFIX = "step."
# The end of the name of a weight that is stored transposed.
TURNED = ".T"


def _accept(name: str, values: Tensor) -> None:
    """Accepts all values: the default check of a weight."""


class StepWeights:
    """The weights of a step, by their names in a traced graph.

    Args:
        step: The step.
        readers: Functions that read weights of the base model that are placeholders in the step, by their names there.
        check: Called with the name in the step and the values of each weight that is read. It raises an error to
            refuse them.
        head_readers: Functions that read weights of the heads that are placeholders in the step, by their names there.
        blocks: Weights of the base model that their file holds in blocks of integers, by their names there. A matrix in
            a stack has the stack's name, a point, and its place.
        packed: How files store weights of the base model that are dequantized when they are read, by their names there.

    Attributes:
        dequantized: How files store the weights that were dequantized so far, by their names in the step.
    """

    def __init__(
        self,
        step: MedusaStep,
        readers: Readers = MappingProxyType({}),
        check: Callable[[str, Tensor], None] = _accept,
        *,
        head_readers: Readers = MappingProxyType({}),
        blocks: Mapping[str, StoredBlocks] = MappingProxyType({}),
        packed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._check = check
        self._lm_head = step.model.get_output_embeddings().weight
        self._embeddings = step.model.get_input_embeddings().weight
        parameters = step.named_parameters(remove_duplicate=False)
        self._parameters = {f"{PREFIX}{name}": weight for name, weight in parameters}
        self._buffers = {f"{PREFIX}{name}": values for name, values in step.named_buffers(remove_duplicate=False)}
        known = readers_by_weight(step.model, readers)
        if step.heads is not None:
            known |= readers_by_weight(step.heads, head_readers)
        self._readers = {name: known.get(id(weight)) for name, weight in self._parameters.items()}
        own = dict(step.model.named_parameters(remove_duplicate=False))
        self._blocks = {id(own[name]): stored for name, stored in blocks.items() if name in own}
        self._parts = {(id(own[stack]), place): stored for stack, place, stored in _in_stacks(blocks, own)}
        self._packed = {id(step.model.get_parameter(name)): kind for name, kind in packed.items()}
        self.dequantized: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def tensor(self, name: str) -> LazyWeight:
        """A weight, or a buffer of the model, as a tensor of a graph."""
        if name in self._buffers:
            values = self._buffers[name]
            return LazyWeight(name, lambda: values, values.shape, values.dtype)
        weight = self._parameters[name]
        is_table = weight is self._embeddings
        return LazyWeight(
            name,
            partial(self._read, name),
            weight.shape,
            weight.dtype,
            self._role(name, weight),
            is_table=is_table,
            blocks=self._checked(name, self._blocks.get(id(weight))),
            parts=self._parts_of(name),
        )

    def _parts_of(self, name: str) -> tuple[StoredBlocks | None, ...]:
        weight = self._parameters[name]
        if weight.ndim != 3:
            return ()
        return tuple(self._checked(name, self._parts.get((id(weight), place))) for place in range(len(weight)))

    def _checked(self, name: str, stored: StoredBlocks | None) -> StoredBlocks | None:
        """The same blocks, whose values are checked when they are read."""
        if stored is None:
            return None

        def read() -> BlockWeight:
            made = stored.read()
            if not made.is_finite:  # the whole matrix in floating point is the largest tensor of an export
                self._check(name.removeprefix(PREFIX), made.dequantized())
            return made

        return replace(stored, read=read)

    def _role(self, name: str, weight: nn.Parameter) -> Role:
        if weight is self._lm_head:
            return "lm_head"
        if weight is self._embeddings:
            return "embeddings"
        return "heads" if name.startswith(f"{PREFIX}heads.") else "layers"

    def _read(self, name: str) -> Tensor:
        read = self._readers[name]
        values = self._parameters[name].detach() if read is None else read()
        self._check(name.removeprefix(PREFIX), values)
        kind = self._packed.get(id(self._parameters[name]))
        if kind is not None:
            self.dequantized[name.removeprefix(PREFIX)] = kind
        return values


class LazyWeight(ir.LazyTensor):
    """A tensor of a graph whose values are made when they are needed, and not kept.

    Args:
        name: The tensor's name.
        read: Makes the values.
        shape: The shape of the values.
        dtype: The dtype of the values.
        role: The part of the model that uses the weight.
        is_table: The model looks rows up in it by token.
        blocks: The weight in blocks of integers that hold it exactly; None if there are none.
        parts: The same for each matrix of a stack; empty for other weights.

    Attributes:
        read: Makes the values.
        torch_dtype: The dtype of the values.
        role: The part of the model that uses the weight.
        is_table: The model looks rows up in it by token.
        blocks: The weight in blocks of integers that hold it exactly; None if there are none.
        parts: The same for each matrix of a stack; empty for other weights.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        role: Role = "other",
        *,
        is_table: bool = False,
        blocks: StoredBlocks | None = None,
        parts: Sequence[StoredBlocks | None] = (),
    ) -> None:
        super().__init__(
            lambda: TorchTensor(self.read().contiguous(), name),
            dtype=from_torch_dtype(dtype),
            shape=ir.Shape(shape),
            name=name,
        )
        self.read = read
        self.torch_dtype = dtype
        self.role = role
        self.is_table = is_table
        self.blocks = blocks
        self.parts = parts

    def transposed(self) -> LazyWeight:
        """The transpose of a matrix, of the same role. It is made when it is read."""
        rows, columns = self.shape.numpy()
        return LazyWeight(f"{self.name}{TURNED}", lambda: self.read().T, (columns, rows), self.torch_dtype, self.role)


def _in_stacks(
    blocks: Mapping[str, StoredBlocks], weights: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, int, StoredBlocks]]:
    """Yields the stack, the place and the blocks of each matrix in a stack."""
    for name, stored in blocks.items():
        stack, _, place = name.rpartition(".")
        if name not in weights and stack in weights and place.isdigit():
            yield stack, int(place), stored


def weight_of(value: ir.Value) -> LazyWeight:
    """The weight that an initializer of a traced graph is."""
    assert isinstance(value.const_value, LazyWeight)
    return value.const_value


def weights_in(name: str) -> tuple[str, ...]:
    """The names in the step of the weights that a matrix of a graph holds, one above the other.

    Args:
        name: The name of the matrix, without the parts that say how it is stored.
    """
    return tuple(part.removeprefix(PREFIX) for part in name.split("+"))

"""Weights that files hold in fewer bits, as tensors that are dequantized when they are read."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from medusa_export.models.blocks import Bits, BlockWeight, joined


@dataclass(frozen=True)
class StoredBlocks:
    """A matrix that a file holds in blocks of integers.

    Attributes:
        bits: The bits per value.
        block_size: The columns per block.
        has_zero_points: True if blocks have zero points that are not in the middle of the range.
        scale_dtype: The smallest dtype that holds the scales and offsets as they are.
        read: Reads the matrix, with its scales in fp32.
        has_offsets: True if blocks have offsets.
    """

    bits: Bits
    block_size: int
    has_zero_points: bool
    scale_dtype: torch.dtype
    read: Callable[[], BlockWeight]
    has_offsets: bool = False

    def exact_in(self, dtype: torch.dtype) -> bool:
        """True if a dtype holds the scales as they are."""
        return torch.promote_types(self.scale_dtype, dtype) == dtype

    def fit(self, bits: Bits, block_size: int) -> bool:
        """True if blocks of some bits and size hold the matrix as it is."""
        return self.bits == bits and self.block_size % block_size == 0


def joined_blocks(parts: Sequence[StoredBlocks | None]) -> StoredBlocks | None:
    """The rows of several matrices as one matrix; None if one of them is not in blocks, or in blocks of another kind.

    Blocks may be of several sizes. They are split to the largest size that divides all.
    """
    blocks = [part for part in parts if part is not None]
    if len(blocks) < len(parts) or len({part.bits for part in blocks}) > 1:
        return None
    size = math.gcd(*(part.block_size for part in blocks))

    def read() -> BlockWeight:
        return joined([part.read().split(size, torch.float32) for part in blocks])

    scale_dtype = functools.reduce(torch.promote_types, [part.scale_dtype for part in blocks])
    has_zero_points = any(part.has_zero_points for part in blocks)
    has_offsets = any(part.has_offsets for part in blocks)
    return StoredBlocks(blocks[0].bits, size, has_zero_points, scale_dtype, read, has_offsets)


@runtime_checkable
class Packed(Protocol):
    """A tensor of a file that is dequantized when it is read.

    Attributes:
        kind: How it is stored, for messages; None if it is stored as it is.
        blocks: Reads it in blocks; None if no blocks hold it exactly.
    """

    kind: str | None
    blocks: StoredBlocks | None


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A weight that several tensors of a file hold together.

    Attributes:
        name: The weight's name, with the prefix that the file uses.
        shape: The weight's shape.
        kind: How it is stored, for messages.
        members: The names of the tensors that hold it.
        read: Reads and dequantizes it.
        blocks: Reads it in blocks; None if no blocks hold it exactly.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    members: frozenset[str]
    read: Callable[[], Tensor]
    blocks: StoredBlocks | None = None

    def __getitem__(self, index: Any) -> Tensor:
        """Reads some of the values, as one reads from an open safetensors file."""
        return self.read()[index]


def exact_blocks(
    sources: Mapping[str, object], stacks: Mapping[str, Sequence[Sequence[object]]], dtype: torch.dtype
) -> dict[str, StoredBlocks]:
    """The tensors of a file that blocks hold exactly, by the names of the model's weights.

    The name of a matrix in a stack is the stack's name, a point, and the matrix's place.

    Args:
        sources: Tensors of files, by the names of the model's weights that they are.
        stacks: Tensors of files that stacks of matrices are made of, by the stack's name: for each matrix, the tensors
            whose rows it has.
        dtype: The dtype that the model computes in.
    """
    blocks = {name: source.blocks for name, source in sources.items() if isinstance(source, Packed)}
    for name, matrices in stacks.items():
        for index, parts in enumerate(matrices):
            blocks[f"{name}.{index}"] = joined_blocks(
                [part.blocks if isinstance(part, Packed) else None for part in parts]
            )
    return {name: stored for name, stored in blocks.items() if stored is not None and stored.exact_in(dtype)}


def packed_kinds(sources: Mapping[str, object], stacks: Mapping[str, Sequence[Sequence[object]]]) -> dict[str, str]:
    """The storage of each weight that is dequantized when it is read, by the weight's name.

    Args:
        sources: As for ``exact_blocks``.
        stacks: As for ``exact_blocks``.
    """
    firsts = {**sources, **{name: matrices[0][0] for name, matrices in stacks.items()}}
    kinds = {name: source.kind for name, source in firsts.items() if isinstance(source, Packed)}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def dequantized_note(source: str, kinds: Sequence[str]) -> str | None:
    """A sentence that says which weights were dequantized to store them in another way; None if there are none.

    Args:
        source: The model's name.
        kinds: How the files of the model store each of these weights.
    """
    if not kinds:
        return None
    counts = ", ".join(f"{kind} ({count})" for kind, count in sorted(Counter(kinds).items()))
    return (
        f"{len(kinds)} matrices of {source} are dequantized: {counts}. The bundle has weights of another type, other "
        "blocks or no zero points, or no blocks hold these matrices exactly."
    )

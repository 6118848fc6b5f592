"""compressed-tensors: integers of up to 8 bits, or fp8, with a scale per matrix, row, group of columns or tile.

A matrix [N, K] of packed integers is stored as

* ``weight_packed`` [N, K · bits / 32]: words of integers, the lowest bits first, each larger by 2 to the power of
  ``bits - 1``;
* ``weight_shape``: N and K;
* ``weight_scale`` [N, groups];
* ``weight_zero_point`` [N · bits / 32, groups]: zero points, packed along the rows; absent if they are 0;
* ``weight_g_idx`` [K]: the group of each column; absent if groups are in order.

A matrix of int8 or fp8 is stored as ``weight``, with ``weight_scale`` and ``weight_zero_point`` that are not packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medusa_export.common.errors import CheckpointError
from medusa_export.models.blocks import BlockWeight
from medusa_export.models.contents import Contents, Readable
from medusa_export.models.packed import PackedTensor, StoredBlocks
from medusa_export.models.quantized.integers import block_bits, grouped, ungrouped, unpack_words
from medusa_export.models.quantized.scaled import scaled_reader

_Parts = Mapping[str, Readable]

# Scales of activations play no part in the weights.
_MEMBERS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def compressed_weights(contents: Contents, settings: Mapping[str, Any]) -> Iterator[PackedTensor]:
    """The matrices that compressed-tensors packed.

    Raises:
        CheckpointError: They are in a format that is not known.
    """
    for module, parts in contents.modules():
        if "weight_scale" not in parts:
            continue
        members = frozenset(f"{module}.{part}" for part in _MEMBERS if part in parts)
        name = f"{module}.weight"
        if "weight_packed" in parts and parts["weight_packed"].dtype == torch.int32 and "weight_shape" in parts:
            rows, columns = parts["weight_shape"][...].tolist()
            bits = parts["weight_packed"].shape[1] * 32 // columns
            if bits in (2, 4, 8):
                yield _integer_weight(name, (rows, columns), parts, bits, members)
                continue
        elif "weight" in parts and parts["weight"].dtype == torch.int8:
            yield _integer_weight(name, parts["weight"].shape, parts, 8, members)
            continue
        elif "weight" in parts and parts["weight"].dtype in _FP8 and "weight_zero_point" not in parts:
            read = scaled_reader(parts["weight"], parts["weight_scale"])
            yield PackedTensor(name, parts["weight"].shape, "compressed-tensors, fp8", members, read)
            continue
        raise CheckpointError(
            f"{name} is packed by compressed-tensors in a way that can't be read: expected integers of 2, 4 or 8 bits, "
            "or fp8. Give the model that it was made from."
        )


def _integer_weight(
    name: str, shape: tuple[int, ...], parts: _Parts, bits: int, members: frozenset[str]
) -> PackedTensor:
    rows, columns = shape
    scales = parts["weight_scale"]
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    whole_rows = scales.shape[0] in (1, rows) if len(scales.shape) == 2 else scales.shape in ((), (1,))
    if not whole_rows or columns % groups:
        raise CheckpointError(
            f"{name} has {list(scales.shape)} scales for a matrix of {rows} by {columns}: expected one per group of "
            "columns in each row. Give the model that it was made from."
        )
    in_order = "weight_g_idx" not in parts
    stored = StoredBlocks(
        block_bits(bits),
        columns // groups,
        "weight_zero_point" in parts or bits != block_bits(bits),
        scales.dtype,
        partial(_blocks, parts, bits, (rows, groups)),
    )
    return PackedTensor(
        name,
        (rows, columns),
        f"compressed-tensors, {bits} bits{'' if in_order else ' in groups that are not in order'}",
        members,
        partial(_dequantized, parts, bits, (rows, groups)),
        stored if in_order else None,
    )


def _blocks(parts: _Parts, bits: int, shape: tuple[int, int]) -> BlockWeight:
    """Reads a matrix with scales of a shape [N, groups]."""
    values, zero_points = _values(parts, bits), _zero_points(parts, bits, shape)
    return grouped(bits, values, parts["weight_scale"][...].expand(shape), zero_points)


def _dequantized(parts: _Parts, bits: int, shape: tuple[int, int]) -> Tensor:
    made = _blocks(parts, bits, shape)
    if "weight_g_idx" not in parts:
        return made.dequantized()
    zero_points = torch.full(shape, made.middle, dtype=torch.uint8) if made.zero_points is None else made.zero_points
    return ungrouped(made.values, made.scales, zero_points, parts["weight_g_idx"][...])


def _values(parts: _Parts, bits: int) -> Tensor:
    """The integers of a matrix as unsigned ones, [N, K]."""
    if "weight_packed" not in parts:
        return _unsigned(parts["weight"][...])
    columns = int(parts["weight_shape"][...][1])
    return unpack_words(parts["weight_packed"][...], bits)[:, :columns].contiguous()


def _zero_points(parts: _Parts, bits: int, shape: tuple[int, int]) -> Tensor | None:
    if "weight_zero_point" not in parts:
        return None
    stored = parts["weight_zero_point"][...]
    if stored.dtype != torch.int32:
        return _unsigned(stored).expand(shape)
    return unpack_words(stored.T.contiguous(), bits)[:, : shape[0]].T.contiguous()


def _unsigned(values: Tensor) -> Tensor:
    """Signed bytes, each larger by 128."""
    return (values.to(torch.int16) + 128).to(torch.uint8)

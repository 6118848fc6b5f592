"""GPTQ: integers of 2, 4 or 8 bits, packed along the columns of a matrix, with groups that may be in any order.

A matrix [N, K] is stored as

* ``qweight`` [K · bits / 32, N]: words of integers of one row of the matrix each, the lowest bits first;
* ``qzeros`` [groups, N · bits / 32]: zero points; the older of the two layouts stores each less one;
* ``scales`` [groups, N];
* ``g_idx`` [K]: the group of each column. It may be absent. With ``desc_act`` groups are not in order.
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

_MEMBERS = ("qweight", "qzeros", "scales", "g_idx")


def gptq_weights(contents: Contents, settings: Mapping[str, Any]) -> Iterator[PackedTensor]:
    """The matrices that GPTQ packed.

    Raises:
        CheckpointError: They are in a layout that is not known.
    """
    bits, layout = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8) or layout not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"GPTQ checkpoints of {bits} bits in the layout {layout!r} can't be read: expected 2, 4 or 8 bits in the "
            "layout gptq or gptq_v2. Give the model that it was made from."
        )
    for module, parts in contents.modules():
        if "qweight" in parts:
            yield _weight(module, parts, bits, 1 if layout == "gptq" else 0)


def _weight(module: str, parts: Mapping[str, Readable], bits: int, offset: int) -> PackedTensor:
    words, rows = parts["qweight"].shape
    columns, groups = words * 32 // bits, parts["scales"].shape[0]
    # These are small. They decide whether blocks hold the matrix.
    zero_points = unpack_words(parts["qzeros"][...], bits).to(torch.int16) + offset
    group_of = parts["g_idx"][...].long() if "g_idx" in parts else torch.arange(columns) // -(-columns // groups)
    in_order = columns % groups == 0 and torch.equal(group_of, torch.arange(columns) // (columns // groups))
    stored = StoredBlocks(
        block_bits(bits),
        columns // groups,
        bool((zero_points != 1 << (block_bits(bits) - 1)).any()),
        parts["scales"].dtype,
        partial(_blocks, parts, bits, zero_points),
    )
    # The layout that stores zero points less one can hold one that is too large for the bits.
    fits = in_order and int(zero_points.max()) < 1 << stored.bits
    return PackedTensor(
        f"{module}.weight",
        (rows, columns),
        f"GPTQ of {bits} bits{'' if in_order else ' with desc_act'}",
        frozenset(f"{module}.{part}" for part in _MEMBERS if part in parts),
        partial(_dequantized, parts, bits, zero_points, group_of),
        stored if fits else None,
    )


def _values(parts: Mapping[str, Readable], bits: int) -> Tensor:
    """The integers of a matrix, [N, K]."""
    return unpack_words(parts["qweight"][...].T.contiguous(), bits)


def _blocks(parts: Mapping[str, Readable], bits: int, zero_points: Tensor) -> BlockWeight:
    has_others = bool((zero_points != 1 << (block_bits(bits) - 1)).any())
    others = zero_points.T.to(torch.uint8) if has_others else None
    return grouped(bits, _values(parts, bits), parts["scales"][...].T, others)


def _dequantized(parts: Mapping[str, Readable], bits: int, zero_points: Tensor, group_of: Tensor) -> Tensor:
    return ungrouped(_values(parts, bits), parts["scales"][...].T, zero_points.T, group_of)

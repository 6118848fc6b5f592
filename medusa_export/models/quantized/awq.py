"""AWQ: integers of 4 bits, packed along the rows of a matrix in an order of its own.

A matrix [N, K] is stored transposed, as

* ``qweight`` [K, N / 8]: words of eight integers each;
* ``qzeros`` [groups, N / 8]: zero points, packed in the same way;
* ``scales`` [groups, N].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from medusa_export.common.errors import CheckpointError
from medusa_export.models.blocks import Bits, BlockWeight
from medusa_export.models.contents import Contents, Readable
from medusa_export.models.packed import PackedTensor, StoredBlocks
from medusa_export.models.quantized.integers import grouped, unpack_words

_BITS: Bits = 4
# The place in a word, counted from its lowest bits, of each of eight neighbours.
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
_MEMBERS = ("qweight", "qzeros", "scales")


def awq_weights(contents: Contents, settings: Mapping[str, Any]) -> Iterator[PackedTensor]:
    """The matrices that AWQ packed.

    Raises:
        CheckpointError: They are in a layout that is not known.
    """
    bits = settings.get("bits", settings.get("w_bit"))
    layout = str(settings.get("version") or settings.get("format") or settings.get("checkpoint_format") or "gemm")
    if bits != _BITS or layout.lower() != "gemm":
        raise CheckpointError(
            f"AWQ checkpoints of {bits} bits in the layout {layout!r} can't be read: expected 4 bits in the layout "
            "gemm. Give the model that it was made from."
        )
    for module, parts in contents.modules():
        if "qweight" in parts:
            columns, groups, rows = parts["qweight"].shape[0], *parts["scales"].shape
            read = partial(_blocks, parts)
            yield PackedTensor(
                f"{module}.weight",
                (rows, columns),
                "AWQ of 4 bits",
                frozenset(f"{module}.{part}" for part in _MEMBERS),
                partial(_dequantized, parts),
                StoredBlocks(_BITS, columns // groups, True, parts["scales"].dtype, read),
            )


def _integers(words: Tensor) -> Tensor:
    """The integers of words [R, C], in their order: [R, 8 · C] uint8."""
    values = unpack_words(words, _BITS)
    return values.view(len(values), -1, 8)[..., _PLACES].flatten(1)


def _blocks(parts: Mapping[str, Readable]) -> BlockWeight:
    values, zero_points = (_integers(parts[part][...]).T.contiguous() for part in ("qweight", "qzeros"))
    return grouped(_BITS, values, parts["scales"][...].T, zero_points)


def _dequantized(parts: Mapping[str, Readable]) -> Tensor:
    return _blocks(parts).dequantized()

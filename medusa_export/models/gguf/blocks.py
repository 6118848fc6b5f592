"""Tensors of a GGUF file that blocks of integers with one scale each hold exactly.

* Q4_0: 4 bits, blocks of 32 columns.
* Q5_0 and Q8_0: held in 8 bits, blocks of 32 columns.
* Q6_K: held in 8 bits, blocks of 16 columns. Its scales are products that only fp32 holds.

The others have a minimum per block that is no multiple of the scale (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K), a table of values
(IQ), or fewer bits in an order of their own (Q3_K).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from medusa_export.models.blocks import Bits

_Bytes = NDArray[np.uint8]


class BlockKind(NamedTuple):
    """A kind of quantization that blocks hold exactly.

    Attributes:
        bits: The bits per value of the blocks.
        block_size: The columns per block.
        scale_dtype: The smallest dtype that holds the scales.
        unpack: Makes unsigned values [N, K] and scales [N, K / block_size] in fp32 of the bytes of N rows. The middle
            of the range of values stands for 0.
    """

    bits: Bits
    block_size: int
    scale_dtype: torch.dtype
    unpack: Callable[[_Bytes], tuple[_Bytes, NDArray[np.float32]]]


def _scales(rows: _Bytes) -> NDArray[np.float32]:
    """fp16 numbers of two bytes each."""
    return np.ascontiguousarray(rows).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(packed: _Bytes) -> _Bytes:
    """The low halves of the bytes of a block, then the high halves."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _q4_0(rows: _Bytes) -> tuple[_Bytes, NDArray[np.float32]]:
    blocks = rows.reshape(len(rows), -1, 18)
    return _nibbles(blocks[..., 2:]).reshape(len(rows), -1), _scales(blocks[..., :2])


def _q5_0(rows: _Bytes) -> tuple[_Bytes, NDArray[np.float32]]:
    blocks = rows.reshape(len(rows), -1, 22)
    fifth_bits = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    values = _nibbles(blocks[..., 6:]) + 16 * fifth_bits + (128 - 16)
    return values.astype(np.uint8).reshape(len(rows), -1), _scales(blocks[..., :2])


def _q8_0(rows: _Bytes) -> tuple[_Bytes, NDArray[np.float32]]:
    blocks = rows.reshape(len(rows), -1, 34)
    values = blocks[..., 2:] ^ np.uint8(0x80)  # signed values, each larger by 128
    return values.reshape(len(rows), -1), _scales(blocks[..., :2])


def _q6_k(rows: _Bytes) -> tuple[_Bytes, NDArray[np.float32]]:
    blocks = rows.reshape(len(rows), -1, 210)
    low, high = (blocks[..., part].reshape(*blocks.shape[:2], 2, -1) for part in (slice(128), slice(128, 192)))
    nibbles = _nibbles(low)  # of two halves of a block, 128 each
    pairs = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    values = nibbles + 16 * pairs + (128 - 32)
    factors = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    scales = _scales(blocks[..., 208:])[..., None] * factors
    return values.astype(np.uint8).reshape(len(rows), -1), scales.reshape(len(rows), -1)


# By gguf's names.
BLOCK_KINDS: Mapping[str, BlockKind] = {
    "Q4_0": BlockKind(4, 32, torch.float16, _q4_0),
    "Q5_0": BlockKind(8, 32, torch.float16, _q5_0),
    "Q8_0": BlockKind(8, 32, torch.float16, _q8_0),
    "Q6_K": BlockKind(8, 16, torch.float32, _q6_k),
}

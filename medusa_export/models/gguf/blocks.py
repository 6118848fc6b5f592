"""Tensors of a GGUF file that blocks of integers with a scale and an offset each hold exactly.

* Q4_0: 4 bits, blocks of 32 columns.
* Q5_0 and Q8_0: held in 8 bits, blocks of 32 columns.
* Q6_K: held in 8 bits, blocks of 16 columns. Its scales are products that only fp32 holds.
* Q4_1 and Q4_K: 4 bits, blocks of 32 columns. The files have minima, from which offsets follow: the value in the middle
  of a block's range is the offset. Only fp32 holds these.
* Q5_1 and Q5_K: the same, held in 8 bits.

The others have a table of values (IQ), or fewer bits (Q2_K, Q3_K).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
        scale_dtype: The smallest dtype that holds the scales and offsets.
        unpack: Makes unsigned values [N, K] and scales [N, K / block_size] in fp32 of the bytes of N rows, and offsets
            if the kind has minima. The middle of the range of values stands for 0, or for the offset.
        has_offsets: True if the kind has minima.
    """

    bits: Bits
    block_size: int
    scale_dtype: torch.dtype
    unpack: Callable[[_Bytes], tuple[NDArray[Any], ...]]
    has_offsets: bool = False


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


def _q4_1(rows: _Bytes) -> tuple[NDArray[Any], ...]:
    blocks = rows.reshape(len(rows), -1, 20)
    scales, minima = _scales(blocks[..., :2]), _scales(blocks[..., 2:4])
    return _nibbles(blocks[..., 4:]).reshape(len(rows), -1), scales, minima + 8 * scales


def _q5_1(rows: _Bytes) -> tuple[NDArray[Any], ...]:
    blocks = rows.reshape(len(rows), -1, 24)
    scales, minima = _scales(blocks[..., :2]), _scales(blocks[..., 2:4])
    fifth_bits = np.unpackbits(blocks[..., 4:8], axis=-1, bitorder="little")
    values = _nibbles(blocks[..., 8:]) + 16 * fifth_bits + (128 - 16)
    return values.astype(np.uint8).reshape(len(rows), -1), scales, minima + 16 * scales


def _q4_k(rows: _Bytes) -> tuple[NDArray[Any], ...]:
    blocks = rows.reshape(len(rows), -1, 144)
    scales, minima = _k_scales(blocks)
    nibbles = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
    return nibbles.reshape(len(rows), -1), scales, minima + 8 * scales


def _q5_k(rows: _Bytes) -> tuple[NDArray[Any], ...]:
    blocks = rows.reshape(len(rows), -1, 176)
    scales, minima = _k_scales(blocks)
    nibbles = _nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).reshape(*blocks.shape[:2], 8, 32)
    fifth_bits = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    values = nibbles + 16 * fifth_bits + (128 - 16)
    return values.astype(np.uint8).reshape(len(rows), -1), scales, minima + 16 * scales


def _k_scales(blocks: _Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and minima of the eight parts of each block of Q4_K or Q5_K, [N, parts]. They are products in fp32."""
    first, second, third = np.split(blocks[..., 4:16], 3, axis=-1)  # six bits each: of eight factors and eight minima
    factors = np.concatenate([first & 0x3F, (third & 0x0F) | (first >> 2 & 0x30)], axis=-1)
    minima = np.concatenate([second & 0x3F, (third >> 4) | (second >> 2 & 0x30)], axis=-1)
    scaled = (_scales(blocks[..., :2])[..., None] * factors, -_scales(blocks[..., 2:4])[..., None] * minima)
    by_row = [part.astype(np.float32).reshape(len(blocks), -1) for part in scaled]
    return by_row[0], by_row[1]


# By gguf's names.
BLOCK_KINDS: Mapping[str, BlockKind] = {
    "Q4_0": BlockKind(4, 32, torch.float16, _q4_0),
    "Q5_0": BlockKind(8, 32, torch.float16, _q5_0),
    "Q8_0": BlockKind(8, 32, torch.float16, _q8_0),
    "Q6_K": BlockKind(8, 16, torch.float32, _q6_k),
    "Q4_1": BlockKind(4, 32, torch.float32, _q4_1, has_offsets=True),
    "Q5_1": BlockKind(8, 32, torch.float32, _q5_1, has_offsets=True),
    "Q4_K": BlockKind(4, 32, torch.float32, _q4_k, has_offsets=True),
    "Q5_K": BlockKind(8, 32, torch.float32, _q5_k, has_offsets=True),
}

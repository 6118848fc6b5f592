"""The slopes of ALiBi: how fast each head's scores fall with distance."""

from __future__ import annotations

import math


def bloom_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes of BLOOM: powers of one base; for a number of heads between two powers of two, of a second one."""
    power = 2 ** math.floor(math.log2(num_heads))
    first, second = _base(power), _base(2 * power)
    slopes = [first**exponent for exponent in range(1, power + 1)]
    slopes += [second**exponent for exponent in range(1, 2 * (num_heads - power), 2)]
    return tuple(slopes)


def mpt_slopes(num_heads: int) -> tuple[float, ...]:
    """The slopes of MPT: those of the next power of two, every second one first."""
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** -(8 * number / power) for number in range(1, power + 1)]
    if power != num_heads:
        slopes = [*slopes[1::2], *slopes[::2]][:num_heads]
    return tuple(slopes)


def _base(num_heads: int) -> float:
    return float(2 ** -(2 ** -(math.log2(num_heads) - 3)))

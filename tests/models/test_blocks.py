"""Block weights: rounding is to the nearest, and bytes hold what they should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.models.blocks import Bits, BlockWeight, round_to_nearest


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 64]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    spread=st.floats(0.02, 100),
    shift=st.floats(-3, 3),
)
def test_no_value_is_farther_than_half_a_step(
    seed: int, bits: Bits, block_size: int, symmetric: bool, dtype: torch.dtype, spread: float, shift: float
) -> None:
    weight = (torch.randn(5, 192, generator=torch.Generator().manual_seed(seed)) + shift) * spread
    blocks = round_to_nearest(weight, bits, block_size, symmetric=symmetric, dtype=dtype)
    scales = blocks.scales.float().abs()
    values = (blocks.values.unflatten(1, (-1, block_size)).float() - _zero_points(blocks)) * blocks.scales.float()[
        ..., None
    ]
    error = (values - weight.unflatten(1, (-1, block_size))).abs().amax(-1)
    # A symmetric range ends half a step before the value opposite to the largest, and zero points are rounded too.
    # A scale that is rounded down moves the end of the range by up to 2^-8 of it.
    steps = 1.0 + (1 << bits) * torch.finfo(dtype).eps
    assert (error <= scales * steps).all()
    inner = (blocks.values > 0) & (blocks.values < (1 << bits) - 1)
    inner_error = torch.where(
        inner.unflatten(1, (-1, block_size)), (values - weight.unflatten(1, (-1, block_size))).abs(), 0
    )
    assert (inner_error <= scales[..., None] * 0.5001).all()


def _zero_points(blocks: BlockWeight) -> torch.Tensor | int:
    return blocks.middle if blocks.zero_points is None else blocks.zero_points.unsqueeze(-1).float()


def test_values_that_a_block_can_hold_stay_as_they_are() -> None:
    values = torch.randint(0, 16, (7, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values[:, ::32] = 0  # the full range is used
    original = BlockWeight(4, 32, values, torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) + 0.1)
    again = round_to_nearest(original.dequantized(), 4, 32, symmetric=True, dtype=torch.float32)
    assert torch.equal(again.values, values)
    assert torch.equal(again.dequantized(), original.dequantized())


def test_bytes() -> None:
    values = torch.tensor([[1, 2, 3, 15] * 4], dtype=torch.uint8)
    blocks = BlockWeight(4, 16, values, torch.ones(1, 1))
    assert blocks.packed().tolist() == [[0x21, 0xF3] * 4]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_of_zeros(symmetric: bool) -> None:
    blocks = round_to_nearest(torch.zeros(2, 32), 4, 16, symmetric=symmetric, dtype=torch.float32)
    assert torch.equal(blocks.dequantized(), torch.zeros(2, 32))


@pytest.mark.parametrize(
    ("scale", "offset", "finite"), [(0.5, 1.0, True), (1e37, 1.0, False), (0.5, float("inf"), False)]
)
def test_scales_tell_that_all_numbers_are_finite(scale: float, offset: float, finite: bool) -> None:
    values = torch.full((2, 32), 255, dtype=torch.uint8)
    scales, offsets = torch.tensor([[0.1], [scale]]), torch.tensor([[0.0], [offset]])
    blocks = BlockWeight(8, 32, values, scales, offsets=offsets)
    assert blocks.is_finite is finite
    if finite:
        assert blocks.dequantized().isfinite().all()

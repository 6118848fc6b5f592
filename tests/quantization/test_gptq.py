"""Laws of GPTQ, on matrices and inputs made here."""

from __future__ import annotations

import pytest
import torch

from medusa_export.models.blocks import round_to_nearest
from medusa_export.models.quantized.integers import pack_words, unpack_words
from medusa_export.quantization.gptq import gptq


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = drawn(0, 24, 96)
# Inputs whose channels are correlated, and of different sizes.
INPUTS = drawn(1, 400, 12) @ drawn(2, 12, 96) + 0.1 * drawn(3, 400, 96)


def error(matrix: torch.Tensor) -> float:
    return float((INPUTS @ (matrix - WEIGHT).T).square().mean())


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (4, 16), (8, 32)])
def test_products_change_less_than_with_rounding_to_the_nearest(bits: int, block_size: int) -> None:
    made = gptq(WEIGHT, INPUTS.T @ INPUTS, bits, block_size, torch.float32)
    nearest = round_to_nearest(WEIGHT, bits, block_size, symmetric=bits == 8, dtype=torch.float32)
    assert (made.zero_points is None) == (bits == 8)
    assert error(made.dequantized()) < 0.5 * error(nearest.dequantized())


def test_without_correlations_each_value_is_rounded_by_itself() -> None:
    made = gptq(WEIGHT, torch.eye(96), 4, 32, torch.float32)
    steps = made.scales.repeat_interleave(32, 1)
    low, high = (made.dequantized() - WEIGHT).amin(), (made.dequantized() - WEIGHT).amax()
    clipped = (made.values == 0) | (made.values == 15)
    assert ((made.dequantized() - WEIGHT).abs() <= steps / 2 + 1e-6)[~clipped].all()
    assert low < 0 < high


def test_a_matrix_that_blocks_hold_exactly_stays_as_it_is() -> None:
    exact = gptq(WEIGHT, torch.eye(96), 4, 32, torch.float32).dequantized()
    again = gptq(exact, INPUTS.T @ INPUTS, 4, 32, torch.float32).dequantized()
    assert float((again - exact).abs().max()) < 1e-5


def test_columns_that_no_input_uses_become_zero() -> None:
    inputs = INPUTS.clone()
    inputs[:, 5] = 0
    made = gptq(WEIGHT, inputs.T @ inputs, 4, 32, torch.float32).dequantized()
    assert made.isfinite().all()
    assert not made[:, 5].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_hold_the_integers(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (5, 37), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = pack_words(values, bits)
    assert words.dtype == torch.int32
    assert torch.equal(unpack_words(words, bits)[:, :37], values)

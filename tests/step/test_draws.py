"""Draws: their distribution is that of transformers, and only places and seeds change them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from medusa_export.step import race, sampling
from medusa_runtime import SamplingParams
from medusa_runtime.bundles.contract import MAX_TOP_K, RACE_BLOCK
from medusa_runtime.sampling import Draws
from support.distributions import FALSE_ALARM, draw, log_probabilities, many, p_value, processed, with_a_chance


@pytest.mark.parametrize("vocab_size", [5, *(pytest.param(size, marks=pytest.mark.slow) for size in (256, 700))])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=2.5),
        SamplingParams(top_k=3),
        SamplingParams(top_k=1),
        SamplingParams(top_p=0.3),
        SamplingParams(top_p=0.97),
        SamplingParams(top_p=0.9999),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
@pytest.mark.parametrize("sharpness", [0.1, 3.0])
def test_the_distribution_is_that_of_transformers(vocab_size: int, params: SamplingParams, sharpness: float) -> None:
    logits = sharpness * torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    expected = processed(logits, params).numpy()
    np.testing.assert_array_equal(with_a_chance(logits, params), np.flatnonzero(expected))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(log_probabilities(logits, params), np.log(expected), atol=1e-4)
    groups = Counter((token % 50,) for token in many(logits, params, 3_000).tolist())
    assert p_value(groups, {(group,): expected[group::50].sum() for group in range(50)}) > FALSE_ALARM


def test_a_nucleus_may_be_larger_than_what_is_sorted() -> None:
    logits = 0.01 * torch.randn(1500, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(top_p=0.5)
    nucleus = np.flatnonzero(processed(logits, params).numpy())
    assert len(nucleus) > 2 * MAX_TOP_K
    np.testing.assert_array_equal(with_a_chance(logits, params), nucleus)


def test_equal_logits_stay_or_go_together() -> None:
    logits = torch.tensor([0.0, 1.0, 0.0, 1.0, -1.0])
    assert with_a_chance(logits, SamplingParams(top_k=1)).tolist() == [1, 3]
    assert with_a_chance(logits, SamplingParams(top_p=0.8)).tolist() == [0, 1, 2, 3]


def test_a_token_without_weight_is_never_drawn() -> None:
    """Blocks that are all but empty, tokens that fill up the last one, and the ends of what numbers may be."""
    logits = torch.full((700,), -torch.inf)
    logits[[5, 300, 301]] = torch.tensor([0.0, -20.0, 3.0])
    assert with_a_chance(logits, SamplingParams()).tolist() == [5, 300, 301]
    assert with_a_chance(logits, SamplingParams(top_p=0.5)).tolist() == [301]
    unlikely = np.full((1, 3 + RACE_BLOCK), 1e-30)
    unlikely[:, [1, 3 + 301 - 256]] = 100.0  # against the only block and the only token that is left
    assert draw(logits, unlikely, SamplingParams(top_p=0.5)).tolist() == [301]


@pytest.mark.slow
def test_rounding_changes_few_draws() -> None:
    """Logits that are off by a thousandth, a flat distribution of many tokens: nearly all draws are the same."""
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    noise = 1e-3 * torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=1.5)
    assert (many(logits, params, 400) == many(logits + noise, params, 400)).mean() > 0.99


def test_a_mutation_of_the_draw_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_below_the_best(scaled: torch.Tensor, *_: object) -> sampling._CutOff:
        like = scaled[..., :1]
        none = torch.zeros_like(like)
        return sampling._CutOff(torch.full_like(like, -1.0), torch.zeros_like(like, dtype=torch.bool), none)

    monkeypatch.setattr(sampling, "_cut_off", one_below_the_best)
    with pytest.raises(AssertionError):
        test_the_distribution_is_that_of_transformers(101, SamplingParams(), 3.0)


def test_a_biased_race_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token keeps its chance and its log probability: only how often each wins tells."""
    monkeypatch.setattr(race, "_by_race", lambda e, blocks: (e[..., :blocks], e[..., blocks:] ** 1.2))
    with pytest.raises(AssertionError):
        test_the_distribution_is_that_of_transformers(101, SamplingParams(), 3.0)


def test_numbers_depend_on_the_seed_and_the_place() -> None:
    draws = Draws(SamplingParams(seed=7), 10, 1000)
    whole = draws.numbers(10, 100)
    assert whole.shape == (100, 4 + RACE_BLOCK) and (whole > 0).all()
    assert len(np.unique(whole)) > 0.99 * whole.size
    for place, count in ((10, 1), (25, 2), (26, 70), (109, 1), (40, 3)):  # also back, beyond what is kept
        np.testing.assert_array_equal(draws.numbers(place, count), whole[place - 10 :][:count])
    moved = Draws(SamplingParams(seed=7), 500, 1000)
    np.testing.assert_array_equal(moved.numbers(500, 20), whole[:20])
    assert not np.array_equal(Draws(SamplingParams(seed=8), 10, 1000).numbers(10, 1), whole[:1])
    assert abs(whole.mean() - 1) < 0.02

"""Laws of the figures that compare two models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from medusa_export.evaluation.figures import Closeness, Counts


def drawn(seed: int) -> torch.Tensor:
    return 3 * torch.randn(40, 17, generator=torch.Generator().manual_seed(seed))


TOKENS = torch.arange(40) % 17


def closeness(logits: torch.Tensor, expected: torch.Tensor) -> Closeness:
    counts = Counts()
    for part in (slice(0, 13), slice(13, 40)):
        counts.add(logits[part], expected[part], TOKENS[part])
    return Closeness.of(counts)


def test_a_model_is_as_close_as_can_be_to_itself() -> None:
    same = closeness(drawn(0), drawn(0))
    assert (same.tokens, same.divergence, same.same_choice, same.perplexity_error) == (40, 0.0, 1.0, 0.0)
    assert same.perplexity_ratio == 1.0


def test_figures_do_not_depend_on_a_constant_added_to_all_logits() -> None:
    assert closeness(drawn(0) + 5, drawn(0)).divergence == pytest.approx(0, abs=1e-6)


def test_perplexity_and_divergence_are_those_of_torch() -> None:
    ours, theirs = drawn(0), drawn(1)
    found = closeness(ours, theirs)
    assert found.perplexity == pytest.approx(math.exp(nn.functional.cross_entropy(ours, TOKENS)))
    assert found.reference_perplexity == pytest.approx(math.exp(nn.functional.cross_entropy(theirs, TOKENS)))
    divergence = nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found.divergence == pytest.approx(float(divergence), rel=1e-5)
    assert found.same_choice == int((ours.argmax(-1) == theirs.argmax(-1)).sum()) / 40


def test_on_text_that_the_model_wrote_the_ratio_of_perplexities_follows_from_the_divergence() -> None:
    theirs = torch.tensor([[1.0, 0.0, -1.0]])
    ours = torch.tensor([[0.6, 0.3, -1.2]])
    counts, draws = Counts(), torch.multinomial(theirs.softmax(-1)[0], 40_000, replacement=True)
    counts.add(ours.expand(len(draws), 3), theirs.expand(len(draws), 3), draws)
    found = Closeness.of(counts)
    distance = abs(found.perplexity_ratio - math.exp(found.divergence))
    assert 0 < found.perplexity_error < 0.01
    assert distance < 5 * found.perplexity_error

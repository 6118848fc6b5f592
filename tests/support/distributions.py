"""Draws from distributions as the step and as transformers do, and tests that both agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from medusa_export.step.sampling import SamplingInputs, sample
from medusa_runtime import SamplingParams
from medusa_runtime.bundles.contract import RACE_BLOCK, constraint_inputs, num_blocks, sampling_inputs
from medusa_runtime.constraints.rows import ConstraintRows
from medusa_runtime.sampling import Draws, SamplingRows

FALSE_ALARM = 1e-6  # the error rate of each test of a distribution; their seeds are fixed


def sampling_inputs_of(exponentials: NDArray[np.floating], params: SamplingParams, vocab_size: int) -> SamplingInputs:
    """The inputs of a batch of rows that draw alike, each with its own numbers, and without constraints."""
    rows = len(exponentials)
    constraints = ConstraintRows(rows, vocab_size, 1)
    made = SamplingRows(rows, constraints)
    for row in range(rows):
        made.assign(row, Draws(params, 0, 1))
    none = constraints.of_step(1, 1, {}, (), lambda: np.zeros((rows, 1), np.int64))
    arrays = {"exponentials": exponentials.astype(np.float32), **made.inputs, **none}
    specs = (*sampling_inputs(vocab_size), *constraint_inputs(vocab_size))
    return SamplingInputs.of([torch.from_numpy(arrays[spec.name]) for spec in specs])


def draw(logits: torch.Tensor, exponentials: NDArray[np.floating], params: SamplingParams) -> NDArray[np.int64]:
    """Draws from one distribution [V] with the numbers of each row, [N, blocks + 256]."""
    rows = len(exponentials)
    none = torch.zeros(rows, 1, dtype=torch.int64)
    given = sampling_inputs_of(exponentials[:, None], params, len(logits))
    return sample(logits.expand(rows, 1, -1), none, none[0], none[:1] > 0, none, given).chosen[:, 0].numpy()


def many(logits: torch.Tensor, params: SamplingParams, count: int) -> NDArray[np.int64]:
    """Draws ``count`` tokens from one distribution."""
    seeded = replace(params, seed=len(logits))
    return draw(logits, Draws(seeded, 0, len(logits)).numbers(0, count), params)


def with_a_chance(logits: torch.Tensor, params: SamplingParams) -> NDArray[np.int64]:
    """The tokens that can be drawn at all. Each gets numbers that let it win if it has any weight."""
    vocab_size = len(logits)
    blocks = num_blocks(vocab_size)
    exponentials = np.ones((vocab_size, blocks + RACE_BLOCK), np.float32)
    token = np.arange(vocab_size)
    exponentials[token, token // RACE_BLOCK] = exponentials[token, blocks + token % RACE_BLOCK] = 1e-30
    return np.flatnonzero(draw(logits, exponentials, params) == token)


def log_probabilities(logits: torch.Tensor, params: SamplingParams) -> NDArray[np.float32]:
    """The log p of all tokens [V], as typical acceptance scores them; -inf where it refuses a token."""
    vocab_size = len(logits)
    allowing = replace(params, acceptance="typical", typical_epsilon=1e-30)
    numbers = np.ones((1, vocab_size, num_blocks(vocab_size) + RACE_BLOCK))
    nodes, zero = torch.arange(vocab_size)[None], torch.zeros(vocab_size, dtype=torch.int64)
    given, none = sampling_inputs_of(numbers, allowing, vocab_size), torch.zeros(vocab_size, vocab_size) > 0
    made = sample(logits.expand(1, vocab_size, -1), nodes, zero, none, zero[None], given)
    return torch.where(made.typical, made.typical_logprobs, -torch.inf)[0].numpy()


def processed(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution [V] that transformers would sample from."""
    scores = TemperatureLogitsWarper(params.temperature)(None, logits.float()[None])
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return scores[0].double().softmax(-1)


def p_value(counts: Counter[tuple], expected: dict[tuple, float]) -> float:
    """The p-value of a chi-square test; cells that are too rare for it are put together."""
    total = counts.total()
    assert set(counts) <= {cell for cell, chance in expected.items() if chance > 0}
    large = [cell for cell, chance in expected.items() if chance * total >= 10]
    rest = 1 - sum(expected[cell] for cell in large)
    pairs = [(counts[cell], expected[cell] * total) for cell in large]
    if rest * total >= 10:
        pairs.append((total - sum(counts[cell] for cell in large), rest * total))
    if len(pairs) == 1:
        return 1.0  # there was no choice
    statistic = sum((got - wanted) ** 2 / wanted for got, wanted in pairs)
    halves = torch.tensor([len(pairs) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*halves))

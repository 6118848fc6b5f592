"""What a bundle is held against: the same model as transformers runs it, with its own attention and cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from medusa_export.step.step import MedusaStep
from medusa_export.verification.checks import Progress


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what transformers answers."""

    ids: list[int]
    expected: list[int]


def greedy_config(model: Any, end_tokens: Sequence[int] | None = None) -> GenerationConfig:
    """Greedy decoding and nothing else: a model's own settings may hold penalties, beams or banned words.

    Args:
        model: The model.
        end_tokens: Ids of the tokens that end an answer, as a bundle has them; the model's own if None.
    """
    own = model.generation_config
    ends = own.eos_token_id if end_tokens is None else [*end_tokens] or None
    return GenerationConfig(do_sample=False, eos_token_id=ends, bos_token_id=own.bos_token_id, pad_token_id=0)


@contextmanager
def with_own_attention(step: MedusaStep) -> Iterator[None]:
    """Has a step's model attend as transformers has it."""
    model: Any = step.model
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def reference_tokens(
    step: MedusaStep, prompt: Sequence[int], count: int, end_tokens: Sequence[int] | None = None
) -> list[int]:
    """transformers' greedy tokens, with its own attention and cache.

    Args:
        step: A step whose model computes in fp32.
        prompt: Token ids.
        count: How many to generate at most.
        end_tokens: As for ``greedy_config``.
    """
    model: Any = step.model
    own, ids = model.generation_config, torch.tensor([list(prompt)])
    # In the model's place, as generate() takes from there what it is not told.
    model.generation_config = greedy_config(model, end_tokens)
    try:
        with with_own_attention(step):
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
    finally:
        model.generation_config = own
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def answered_prompts(
    step: MedusaStep,
    prompts: Sequence[Sequence[int]],
    count: int,
    progress: Progress,
    end_tokens: Sequence[int] | None = None,
) -> list[Prompt]:
    """Prompts with up to ``count`` tokens of transformers' each; ``end_tokens`` as for ``greedy_config``."""
    progress(f"answering {len(prompts)} prompts with transformers")
    return [Prompt(list(ids), reference_tokens(step, ids, count, end_tokens)) for ids in prompts]

"""What a bundle is held against: the same model as transformers runs it, with its own attention and cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from medusa_export.step import MedusaStep
from medusa_export.verify_checks import Progress

_GREEDY: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0}


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what transformers answers."""

    ids: list[int]
    expected: list[int]


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


def reference_tokens(step: MedusaStep, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' greedy tokens, with its own attention and cache.

    Args:
        step: A step whose model computes in fp32.
        prompt: Token ids.
        count: How many to generate at most.
    """
    model: Any = step.model
    with with_own_attention(step):
        ids = torch.tensor([list(prompt)])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, **_GREEDY
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def answered_prompts(
    step: MedusaStep, prompts: Sequence[Sequence[int]], count: int, progress: Progress
) -> list[Prompt]:
    """Prompts with up to ``count`` tokens of transformers' each."""
    progress(f"answering {len(prompts)} prompts with transformers")
    return [Prompt(list(ids), reference_tokens(step, ids, count)) for ids in prompts]

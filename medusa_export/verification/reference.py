"""The reference of a verification: the same model in transformers, with its own attention and cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from medusa_export.common.progress import OnProgress, Progress
from medusa_export.compat.transformers import attention_of, cache_argument, default_attention
from medusa_export.models.text_model import whole_of
from medusa_export.step.integer_caches import restored, rounded
from medusa_export.step.step import MedusaStep


@dataclass(frozen=True)
class Prompt:
    """A prompt and its answer by transformers, as token ids."""

    ids: list[int]
    expected: list[int]


def greedy_config(model: Any, end_tokens: Sequence[int] | None = None) -> GenerationConfig:
    """Returns a generation config for greedy decoding, without the penalties, beams or banned words of the model's own.

    Args:
        model: The model.
        end_tokens: Ids of the tokens that end an answer; the model's own if None.
    """
    own = model.generation_config
    ends = own.eos_token_id if end_tokens is None else [*end_tokens] or None
    return GenerationConfig(do_sample=False, eos_token_id=ends, bos_token_id=own.bos_token_id, pad_token_id=0)


class _IntegerCache(DynamicCache):  # type: ignore[misc]  # transformers has no types here
    """A cache of transformers whose entries are rounded as in a step with 8-bit caches."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (restored(*rounded(entries)) for entries in (key_states, value_states))
        updated: tuple[Tensor, Tensor] = super().update(keys, values, *args, **kwargs)
        return updated


def _own_cache(step: MedusaStep) -> dict[str, DynamicCache]:
    """The argument with the cache that transformers is to use; none where it makes its own."""
    if step.kv_cache is None:
        return {}
    model = whole_of(step.model)
    return {cache_argument(model): _IntegerCache(config=model.config.get_text_config(decoder=True))}


def reference_logits(step: MedusaStep, ids: Sequence[int]) -> Tensor:
    """The logits of transformers after each token of a text, [S, V], with its own attention and cache."""
    model: Any = step.model
    with torch.no_grad(), with_own_attention(step):
        logits: Tensor = model(torch.tensor([list(ids)]), **_own_cache(step)).logits[0]
    return logits.float()


@contextmanager
def with_own_attention(step: MedusaStep) -> Iterator[None]:
    """Gives the step's model transformers' own attention while the block lasts."""
    model: Any = whole_of(step.model)
    ours = attention_of(step.model)
    model.set_attn_implementation(default_attention(model))
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def reference_tokens(
    step: MedusaStep, prompt: Sequence[int], count: int, end_tokens: Sequence[int] | None = None
) -> list[int]:
    """Decodes greedily with transformers, with its own attention and cache.

    Args:
        step: A step whose model computes in fp32.
        prompt: Token ids.
        count: Largest number of tokens to generate.
        end_tokens: Ids of the tokens that end an answer; the model's own if None.

    Returns:
        The generated token ids.
    """
    model: Any = whole_of(step.model)  # a text model answers as the larger model that it is a part of
    own, ids = model.generation_config, torch.tensor([list(prompt)])
    # generate() takes all settings that it is not given from the model's own.
    model.generation_config = greedy_config(model, end_tokens)
    try:
        with with_own_attention(step):
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **_own_cache(step))
    finally:
        model.generation_config = own
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def answered_prompts(
    step: MedusaStep,
    prompts: Sequence[Sequence[int]],
    count: int,
    on_progress: OnProgress,
    end_tokens: Sequence[int] | None = None,
) -> list[Prompt]:
    """Answers prompts with ``reference_tokens``.

    Args:
        step: A step whose model computes in fp32.
        prompts: Token ids of each prompt.
        count: Largest number of tokens to generate per prompt.
        on_progress: Receives reports.
        end_tokens: Ids of the tokens that end an answer; the model's own if None.
    """
    on_progress(Progress(f"answering {len(prompts)} prompts with transformers"))
    return [Prompt(list(ids), reference_tokens(step, ids, count, end_tokens)) for ids in prompts]

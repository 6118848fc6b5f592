"""Stage ``torch-exact``: tokens of the PyTorch step on the device, against transformers' own greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gpu_stages.context import Context
from medusa_export.heads.modules import MedusaHeads
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.eager import EagerBackend
from medusa_export.step.fused import FUSED
from medusa_export.step.replay import ReplayedSteps
from medusa_export.step.step import MedusaStep
from medusa_export.verification.oracle import oracle_tree
from medusa_runtime.bundles.tree import Tree

TREE = Tree.from_paths([[0], [0, 0], [1], [0, 0, 0], [0, 1], [1, 0], [2], [0, 0, 1]])
VOCAB_SIZE, CAPACITY = 211, 256
TOKENS, DRY_TOKENS, DRY_FAMILIES = 48, 10, 2
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
    # large enough that all parts of a layer change the result
    "initializer_range": 0.3,
}  # fmt: skip
# Grouped queries, windows, soft caps, norms of queries, experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen3": {},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 3.0},
    "phi3": {"partial_rotary_factor": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
PROMPTS = [[(7 * i * i + 3 + row) % 199 for i in range(length)] for row, length in enumerate((13, 6, 20))]

# Decodes a prompt, given the right tokens to make drafts of.
Decode = Callable[[MedusaStep, Sequence[int], Sequence[int]], list[int]]


def run(context: Context) -> None:
    """Compares the tokens of each family, in fp32, with right and wrong drafts. Both ways to run a step are tried."""
    torch.set_grad_enabled(False)
    count = DRY_TOKENS if context.is_dry else TOKENS
    found: dict[str, dict[str, list[bool] | str]] = {}
    for family in [*FAMILIES][: DRY_FAMILIES if context.is_dry else None]:
        try:
            found[family] = _family(context, family, count)
        except Exception as error:  # noqa: BLE001  # the other families are tried all the same
            found[family] = {"made": f"{type(error).__name__}: {error}"}
        wrong = [name for name, ways in found.items() if any(rows != [True] * len(PROMPTS) for rows in ways.values())]
        context.note(families=found, agrees=not wrong, tokens_each=count, dtype="float32", wrong=wrong)


def _family(context: Context, family: str, count: int) -> dict[str, list[bool] | str]:
    """Returns what ``_compared`` finds for each way to run a step."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **(_SIZES | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config).eval().to(context.device)
    expected = [_greedy(model, prompt, count) for prompt in PROMPTS]
    step = step_of(model)
    ways = (("backend", by_backend), ("replayed", by_replay))
    return {name: _compared(decode, step, expected) for name, decode in ways}


def _compared(decode: Decode, step: MedusaStep, expected: Sequence[list[int]]) -> list[bool] | str:
    """For each prompt whether the tokens are right; an error in its words if a step can't run."""
    try:
        return [decode(step, prompt, right) == right for prompt, right in zip(PROMPTS, expected, strict=True)]
    except Exception as error:  # noqa: BLE001  # the other families are tried all the same
        return f"{type(error).__name__}: {error}"


def step_of(model: PreTrainedModel) -> MedusaStep:
    """A step of a model with heads of random weights, on the model's device."""
    heads = MedusaHeads.fresh(3, model.get_output_embeddings(), conditioned=True)
    for parameter in heads.parameters():
        parameter.normal_(0, 0.3)
    model.set_attn_implementation(ATTENTION_NAME)
    with model.device:
        return MedusaStep(model, heads.to(model.device), TREE).eval().to(model.device)


def _greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def _drafts(answer: Sequence[int], right: Sequence[int], rng: np.random.Generator, size: int) -> list[int]:
    """A draft that is right down to a random node."""
    after = [*right[len(answer) :], *[0] * (TREE.max_depth + 1)]
    return [int(token) for token in oracle_tree(TREE, answer[-1], after, int(rng.integers(size)), VOCAB_SIZE)]


def by_backend(step: MedusaStep, prompt: Sequence[int], right: Sequence[int]) -> list[int]:
    """Decodes with ``EagerBackend``, whose host reads and writes all state in each step."""
    backend, rng = EagerBackend(step), np.random.default_rng(0)
    backend.reserve(CAPACITY)
    answer, size = backend.step(len(prompt), {0: prompt}).tokens[0, :1].tolist(), TREE.size
    while len(answer) < len(right):
        backend.drafts[0] = _drafts(answer, right, rng, size)
        result = backend.step(size)
        answer += result.tokens[0, : result.count[0]].tolist()
        size = 1 + int(rng.integers(TREE.size))
    return [int(token) for token in answer[: len(right)]]


def by_replay(step: MedusaStep, prompt: Sequence[int], right: Sequence[int]) -> list[int]:
    """Decodes with ``ReplayedSteps``: CUDA graphs, fused attention, caches in place, and heads' own drafts at times."""
    step.kernels = FUSED
    try:
        steps, rng = ReplayedSteps(step, CAPACITY), np.random.default_rng(0)
        answer, size = steps.prefill(prompt), TREE.size
        while len(answer) < len(right):
            if rng.random() < 0.8:  # the rest keeps the draft of the heads
                steps.draft(_drafts(answer, right, rng, size))
            steps.run(size)
            answer += steps.read()
            size = (1, 4, TREE.size)[int(rng.integers(3))]
        return answer[: len(right)]
    finally:
        del step.kernels

"""Helpers that export steps, and decode with a backend directly: rows that prefill and decode side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from medusa_export.common.dtypes import KvCacheType
from medusa_export.graph.export import StepGraph, build_graph
from medusa_export.heads.modules import MedusaHeads
from medusa_export.models.end_tokens import EndTokens
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.step import MedusaStep
from medusa_export.targets.bundle_writer import write_bundle
from medusa_export.trees.prior import prior_acceptance
from medusa_export.verification.oracle import oracle_tree
from medusa_runtime import Bundle, Tree
from medusa_runtime.backends.base import Backend
from support.tiny_models import randomize

# It has one more level than most tests have heads.
TREE = Tree.from_paths([[0], [0, 0], [1], [0, 0, 0], [0, 1], [1, 0], [2], [0, 0, 0, 0]])


def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The greedy tokens of transformers' ``generate``."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return output[0, len(prompt) :].tolist()


def random_heads(model: PreTrainedModel, num_heads: int = 3, seed: int = 5) -> MedusaHeads:
    """Heads with random weights, so that each drafts other tokens."""
    heads = MedusaHeads.fresh(num_heads, model.get_output_embeddings())
    randomize(heads, seed)
    return heads.to(model.dtype).eval().requires_grad_(False)


def make_step(
    model: PreTrainedModel, heads: MedusaHeads | None, tree: Tree = TREE, *, kv_cache: KvCacheType | None = None
) -> MedusaStep:
    """A step of a model and heads, with a tree."""
    model.set_attn_implementation(ATTENTION_NAME)
    return MedusaStep(model, heads, tree, kv_cache=kv_cache).eval()


def export(
    step: MedusaStep,
    folder: Path,
    *,
    tokenizer: object = None,
    trained: bool = False,
    graph: StepGraph | None = None,
) -> Bundle:
    """Exports a step to a bundle, by its own graph or by one that was made of it."""
    write_bundle(
        graph or build_graph(step),
        step,
        tokenizer,
        folder,
        name="tiny",
        tree_name="test",
        acceptance=prior_acceptance(step.tree, trained=trained),
        trained=trained,
        end_tokens=EndTokens(step.model, None),  # those at which transformers' generate ends
    )
    return Bundle.load(folder)


@dataclass
class Decoded:
    """Decoded tokens of each row, and how often steps emitted each number of tokens."""

    tokens: list[list[int]]
    accepted: Counter[int] = field(default_factory=Counter)


def decode(
    backend: Backend,
    tree: Tree,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    *,
    size: int,
    chunk: int,
    count: int,
    seed: int | None = 0,
    vocab_size: int = 101,
) -> Decoded:
    """Decodes with drafts that are right up to a random node, or with the heads' own drafts.

    Args:
        backend: The backend.
        tree: The backend's tree.
        prompts: A prompt for each row.
        expected: The right tokens of each row, which ``oracle_tree`` makes drafts of.
        size: Nodes that a step verifies.
        chunk: Tokens per chunk of a prompt.
        count: Tokens to decode per row.
        seed: Seed of the random nodes; None to verify the heads' drafts.
        vocab_size: Size of the vocabulary.
    """
    rng = np.random.default_rng(seed)
    left = [list(prompt) for prompt in prompts]
    result = Decoded([[] for _ in prompts])
    backend.reserve(tree.max_depth + max(map(len, prompts)) + count + 2 * (tree.max_depth + 1) + max(size, chunk))
    for row in range(len(prompts)):
        backend.reset(row)
    while min(map(len, result.tokens)) < count:
        chunks = {row: rest[:chunk] for row, rest in enumerate(left) if rest}
        width = max([size, *(len(part) for part in chunks.values())])
        if seed is not None:
            for row, tokens in enumerate(result.tokens):
                after = [*expected[row][len(tokens) :], *[0] * (tree.max_depth + 1)]
                if row not in chunks:
                    node = int(rng.integers(min(width, tree.size)))
                    backend.drafts[row] = oracle_tree(tree, tokens[-1], after, node, vocab_size)
        step = backend.step(width, chunks)
        for row, tokens in enumerate(result.tokens):
            if row in chunks:
                left[row] = left[row][chunk:]
            if not left[row]:
                emitted = step.tokens[row, : step.count[row]].tolist()
                tokens.extend(emitted[: count - len(tokens)])
                result.accepted[len(emitted)] += row not in chunks
    return result

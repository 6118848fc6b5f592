"""Every family in every way to run it: each graph of its bundle emits the tokens of transformers.

Each test exports one family once, and takes about half a minute. So these tests run only with ``-m exhaustive``.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from medusa_export.step.eager import EagerBackend
from medusa_export.step.step import MedusaStep
from medusa_export.verification.checks import Tolerances
from medusa_export.verification.reference import with_own_attention
from medusa_runtime import Bundle, MedusaEngine, MedusaService, SamplingParams
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import GRAPH, ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_CUDA_GRAPH, ONNXRUNTIME_GRAPH
from support.decoding import TREE, decode, greedy
from support.stock import Stock
from support.tiny_models import FORMS, SEEDS, SUPPORTED_FAMILIES, tiny_model

COUNT = 48
PROMPTS = [
    [(7 * i * i + 3) % 101 for i in range(37)],
    [(5 * i * i + 11 * i + 1) % 101 for i in range(37)],
    [(3 * i * i + 19 * i + 8) % 101 for i in range(20)],
]
SIZES = (1, 3, 8, TREE.size)
WAYS = list(itertools.product(SIZES, (7, 16, 64)))  # tree size, prefill chunk
EAGER_WAYS = [(1, 64), (3, 7), (8, 16), (9, 7)]  # the eager step takes longer
ROWS = {GRAPH: (1, 3), ONNXRUNTIME_GRAPH: (1,), ONNXRUNTIME_BATCH_GRAPH: (3,), ONNXRUNTIME_CUDA_GRAPH: (3,)}
SAMPLING = [
    SamplingParams(temperature=0.8, top_k=20, seed=3),
    SamplingParams(temperature=1.1, top_p=0.9, min_p=0.02, seed=11),
]


@dataclass
class Comparison:
    """Compares texts of a bundle with those of transformers.

    Attributes:
        step: The step that the bundle was exported from.
        wrong: Sentences on differences. Those between tokens whose logits are as good as equal are warnings.
    """

    step: MedusaStep
    wrong: list[str] = field(default_factory=list)

    def add(self, way: str, prompt: Sequence[int], tokens: Sequence[int], expected: Sequence[int]) -> None:
        """Compares the tokens after a prompt with the expected ones, up to the first difference."""
        place = next((i for i, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            return
        with torch.no_grad(), with_own_attention(self.step):
            logits = self.step.model(torch.tensor([[*prompt, *expected[:place]]])).logits[0, -1]
        margin = float(logits[expected[place]] - logits[tokens[place]])
        words = f"{way}: token {place} is {tokens[place]}, not {expected[place]}, by a margin of {margin:.2g}"
        if abs(margin) <= Tolerances.of("float32").margin:
            warnings.warn(f"tie: {words}", stacklevel=2)
        else:
            self.wrong.append(words)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [*SUPPORTED_FAMILIES, *FORMS])
def test_all_graphs_answer_as_transformers(stock: Stock, family: str) -> None:
    model = tiny_model(family, SEEDS.get(family, 0))
    expected = [greedy(model, prompt, COUNT) for prompt in PROMPTS]
    assert len(set(expected[0])) > 5
    exported = stock.export(family, SEEDS.get(family, 0))
    comparison = Comparison(exported.step)
    sampled = sampled_texts(exported.bundle, EagerBackend(exported.step), sizes=(1,))
    decode_in(EAGER_WAYS, EagerBackend(exported.step, rows=3), comparison, "eager", expected)
    for graph, counts in ROWS.items():
        if graph not in exported.bundle.files:
            assert exported.bundle.graphs[graph].left_out
            continue
        for rows in counts:
            name = f"{graph} of {rows} rows"
            make = partial(
                OnnxRuntimeBackend, exported.bundle, rows=rows, threads=1, graph=exported.bundle.folder / graph
            )
            backend = make()
            decode_in(WAYS, backend, comparison, name, expected)
            texts = sampled_texts(exported.bundle, backend, sizes=SIZES)
            assert texts == sampled * len(SIZES), f"{name} samples other texts"
            for size in (3, TREE.size):
                with MedusaService(exported.bundle, make(), None, prefill_chunk=7, tree_size=size) as service:
                    serve(service, comparison, f"service on {name}, tree size {size}", expected)
    assert not comparison.wrong, "\n".join(comparison.wrong)


def decode_in(
    ways: Sequence[tuple[int, int]],
    backend: Backend,
    comparison: Comparison,
    name: str,
    expected: Sequence[Sequence[int]],
) -> None:
    """Decodes with some tree sizes and chunks. All rows of the backend run at a time."""
    rows = backend.rows
    for size, chunk in ways:
        decoded = decode(
            backend, TREE, PROMPTS[:rows], expected[:rows], size=size, chunk=chunk, count=COUNT, seed=chunk
        )
        for row, tokens in enumerate(decoded.tokens):
            way = f"{name}, row {row}, tree size {size}, chunk {chunk}"
            comparison.add(way, PROMPTS[row], tokens, expected[row])


def sampled_texts(bundle: Bundle, backend: Backend, *, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Sampled tokens after the first prompt, for each tree size and each of ``SAMPLING``."""
    engine = MedusaEngine(bundle, backend, None)
    texts = []
    for size in sizes:
        for sampling in SAMPLING:
            engine.evict()
            result = engine.generate(
                PROMPTS[0], max_new_tokens=COUNT, tree_size=size, prefill_chunk=16, sampling=sampling
            )
            texts.append(result.token_ids)
    return texts


def serve(service: MedusaService, comparison: Comparison, name: str, expected: Sequence[Sequence[int]]) -> None:
    """Compares answers to requests that come all at once. Some begin as others do."""
    requests = list(zip(PROMPTS, expected, strict=True))
    requests += [([*prompt, *tokens[:10]], tokens[10:]) for prompt, tokens in requests]
    handles = [service.submit(prompt, max_new_tokens=len(tokens)) for prompt, tokens in requests]
    for number, ((prompt, tokens), handle) in enumerate(zip(requests, handles, strict=True)):
        comparison.add(f"{name}, request {number}", prompt, handle.result(120).token_ids, tokens)

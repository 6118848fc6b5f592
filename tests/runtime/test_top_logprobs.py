"""The most likely tokens in each place are those of transformers, whatever the steps that emit the answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from medusa_runtime import (
    Bundle,
    Chunk,
    Constraints,
    GenerationResult,
    Grammar,
    MedusaEngine,
    MedusaService,
    RequestError,
    SamplingParams,
)
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import GRAPH
from medusa_runtime.sampling import GREEDY, Draws
from medusa_runtime.text.tokenizer import Tokenizer
from support.on_host import OnnxRuntimeOnHost
from support.rig import KINDS, Rig, rig_of
from support.right_drafts import RightDrafts
from support.stock import Stock
from support.tiny_models import tiny_model

COUNT = 30
PROMPTS = [[(7 * i * i + 3 * length) % 101 for i in range(length)] for length in (13, 22, 30, 9)]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampling": SamplingParams(temperature=1.5, seed=3)},
    "constrained": {
        "sampling": SamplingParams(temperature=0.7, top_k=9, seed=5),
        "constraints": Constraints(repetition_penalty=1.4, banned_token_ids=[22, 37, 5]),
    },
    "typical": {"sampling": SamplingParams(acceptance="typical", seed=8)},
}


@pytest.fixture(scope="module", params=KINDS)
def rig(request: pytest.FixtureRequest, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_of(request.param, tiny_bundle, tmp_path_factory.mktemp("engine")) as rig:
        yield rig


def check(prompt: list[int], result: GenerationResult, count: int) -> None:
    """Compares an answer's log probabilities with those of transformers."""
    with torch.no_grad():
        logits = tiny_model("llama")(torch.tensor([[*prompt, *result.token_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert result.top_logprobs is not None and result.logprobs is not None
    tokens = torch.tensor([[top.token_id for top in place] for place in result.top_logprobs])
    values = torch.tensor([[top.logprob for top in place] for place in result.top_logprobs])
    assert all(len({*place}) == count for place in tokens.tolist())
    torch.testing.assert_close(values, expected.topk(count).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(values, expected.gather(1, tokens), atol=1e-4, rtol=0)  # equal ones in any order
    chosen = expected.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(result.logprobs), chosen, atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("graph", [None, GRAPH])
def test_every_place_of_an_answer_has_them(tiny_bundle: Bundle, way: str, graph: str | None) -> None:
    """With trees of several sizes whose drafts are often accepted, and with prompts in chunks."""
    options: dict[str, Any] = {"max_new_tokens": COUNT, "logprobs": True, "top_logprobs": 20, **WAYS[way]}
    path = None if graph is None else tiny_bundle.folder / graph
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        plain = engine.generate(PROMPTS[1], tree_size=1, lookup=False, **options)
    check(PROMPTS[1], plain, 20)
    backend = RightDrafts(tiny_bundle, [[*PROMPTS[1], *plain.token_ids]], graph=path)
    with MedusaEngine(tiny_bundle, backend, None) as engine:
        accepted = 0
        for size, chunk in ((3, 7), (9, 512), (9, 1)):
            engine.evict()
            result = engine.generate(PROMPTS[1], tree_size=size, prefill_chunk=chunk, **options)
            check(PROMPTS[1], result, 20)
            accepted += result.stats.completion_tokens - 1 - result.stats.steps
        assert accepted > COUNT // 2, "no draft was ever accepted: that shows nothing"


def test_only_some_rows_of_a_batch_ask(tiny_bundle: Bundle, rig: Rig) -> None:
    options: dict[str, Any] = {"max_new_tokens": COUNT, "logprobs": True}
    ways = [*WAYS.values()]
    with MedusaService(tiny_bundle, rig.backend(), None, prefill_chunk=8) as service:
        handles = [
            service.submit(prompt, top_logprobs=count, **options, **ways[number % 3])
            for number, (prompt, count) in enumerate(zip(PROMPTS[:4], (3, 0, 20, 1), strict=True))
        ]
        results = [handle.result(60) for handle in handles]
        after = service.generate(PROMPTS[0], max_new_tokens=4, logprobs=True)
    for prompt, result, count in zip(PROMPTS[:4], results, (3, 0, 20, 1), strict=True):
        if count:
            check(prompt, result, count)
    assert results[1].top_logprobs is after.top_logprobs is None


def test_a_backend_on_a_device_gives_them(tiny_bundle: Bundle) -> None:
    with MedusaService(tiny_bundle, OnnxRuntimeOnHost(tiny_bundle, rows=2, threads=1), None) as service:
        handles = [
            service.submit(prompt, max_new_tokens=COUNT, logprobs=True, top_logprobs=7, **WAYS["sampled"])
            for prompt in PROMPTS[:2]
        ]
        for prompt, handle in zip(PROMPTS, handles, strict=False):
            check(prompt, handle.result(60), 7)


@pytest.mark.parametrize("kind", [OnnxRuntimeBackend, OnnxRuntimeOnHost])
def test_a_step_in_which_no_row_asks_gives_none(tiny_bundle: Bundle, kind: type[OnnxRuntimeBackend]) -> None:
    backend: Backend = kind(tiny_bundle, rows=2, threads=1)
    backend.reserve(64)
    backend.assign(0, Draws(GREEDY, len(PROMPTS[0]), 101, ranks=True))
    backend.assign(1, Draws(GREEDY, len(PROMPTS[1]), 101))
    first = backend.step(30, {0: PROMPTS[0], 1: PROMPTS[1]}).top_tokens
    assert first is not None and first.shape == (2, 1, 20)  # one place, as both rows prefill
    depth = tiny_bundle.tree.max_depth
    for size, places in ((1, 1), (3, 3), (9, depth + 1)):
        ranked = backend.step(size).top_tokens
        assert ranked is not None and ranked.shape == (2, places, 20)
    assert kind is OnnxRuntimeOnHost or backend.step(9, {}, [1]).top_tokens is None
    backend.assign(0, None)
    assert backend.step(9).top_tokens is None
    backend.close()


def test_the_chosen_token_need_not_be_among_them(tiny_bundle: Bundle) -> None:
    """A grammar forces digits. What is listed is the base model's own distribution."""
    constraints = Constraints(grammar=Grammar.regex("[0-9]{12}"))
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        result = engine.generate(
            PROMPTS[2], max_new_tokens=12, stop_token_ids=[0], logprobs=True, top_logprobs=2, constraints=constraints
        )
    check(PROMPTS[2], result, 2)
    assert result.top_logprobs is not None
    outside = [
        token not in [top.token_id for top in place]
        for token, place in zip(result.token_ids, result.top_logprobs, strict=True)
    ]
    assert sum(outside) > 6


def test_chunks_and_stop_strings_cut_them_with_the_tokens(tiny_bundle: Bundle) -> None:
    tokenizer = Tokenizer.load(tiny_bundle.folder)
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 4, "sampling": SamplingParams(seed=1)}
    with MedusaService.load(tiny_bundle.folder, rows=1, threads=1, tree_size=9) as service:
        whole = service.generate(PROMPTS[0], max_new_tokens=COUNT, **options)
        assert whole.top_logprobs is not None and tokenizer is not None
        stop = whole.text[6:8]
        handle = service.submit(PROMPTS[0], max_new_tokens=COUNT, stop=stop, **options)
        chunks: list[Chunk] = list(handle)
        result = handle.result(60)
    assert result.finish_reason == "stop" and 0 < len(result.token_ids) < COUNT
    assert result.top_logprobs == whole.top_logprobs[: len(result.token_ids)]
    assert all(chunk.top_logprobs is not None and len(chunk.top_logprobs) == len(chunk.token_ids) for chunk in chunks)
    assert sum((chunk.top_logprobs or () for chunk in chunks), ()) == result.top_logprobs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21: expected an integer up to 20"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs is -1: expected an integer of at least 0"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs is True: expected an integer"),
        ({"top_logprobs": 2}, "top_logprobs needs log probabilities: set logprobs, too"),
    ],
)
def test_values_that_are_refused(engine: MedusaEngine, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine.generate(PROMPTS[0], **options)


def test_a_bundle_that_is_greedy_only_refuses_them(stock: Stock) -> None:
    with MedusaEngine.load(stock.export(sampling=False).bundle.folder, threads=1) as engine:
        with pytest.raises(RequestError, match="greedy only and can't give log probabilities"):
            engine.generate(PROMPTS[0], logprobs=True, top_logprobs=2)
        assert engine.generate(PROMPTS[0], max_new_tokens=3).top_logprobs is None

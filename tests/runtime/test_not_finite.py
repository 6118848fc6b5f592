"""Values that are not finite: those of one request never reach another, and a rejected draft changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.step.eager import EagerBackend
from medusa_runtime import Bundle, MedusaEngine, MedusaService, NotFiniteError, SamplingParams
from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import GRAPH, ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_GRAPH
from support.decoding import export, greedy, make_step, random_heads
from support.stock import Exported, Stock
from support.tiny_models import VOCAB_SIZE, tiny_model

GRAPHS = (GRAPH, ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH)
WRONG = (np.nan, np.inf, -np.inf)
POISON = 77  # the token whose embedding is infinite
PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2, 7])
NEW = 12


@pytest.fixture(scope="session")
def poisoned(stock: Stock) -> Exported:
    """A random mistral with heads, two of whose embedding rows are infinite: of the poison token and of padding."""
    model = tiny_model("mistral", seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[[0, POISON]] = torch.inf
        model.get_output_embeddings().weight[[0, POISON]] = 0  # these are never the best tokens
    step = make_step(model, random_heads(model))
    return Exported(step, Bundle.load(stock.folder("poisoned", lambda out: export(step, out, trained=True))))


@pytest.fixture(scope="session")
def right(poisoned: Exported) -> list[list[int]]:
    """The greedy answers of transformers."""
    model = poisoned.step.model
    model.set_attn_implementation("eager")
    try:
        answers = [greedy(model, prompt, NEW) for prompt in PROMPTS]
    finally:
        model.set_attn_implementation("medusa_export")
    assert not {0, POISON} & {token for answer in answers for token in answer}
    return answers


def drafting_poison(kind: type[Any]) -> type[Any]:
    """A backend that drafts the poison token in half of its nodes, as heads may."""

    class Drafting(kind):  # type: ignore[misc]
        silent = 0

        def step(self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, *rows: Any) -> StepResult:
            self.drafts[:, 1::2] = POISON
            result: StepResult = super().step(size, prompts, *rows)
            self.silent += int((result.count == 0).any())
            return result

    return Drafting


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("size", [2, 9])
def test_a_rejected_draft_that_overflows_changes_nothing(
    poisoned: Exported, right: list[list[int]], graph: str, size: int
) -> None:
    backend = drafting_poison(OnnxRuntimeBackend)(poisoned.bundle, graph=poisoned.bundle.folder / graph)
    engine = MedusaEngine(poisoned.bundle, backend, None)
    for prompt, answer in zip(PROMPTS, right, strict=True):
        result = engine.generate(prompt, max_new_tokens=NEW, tree_size=size)
        assert list(result.token_ids) == answer
    assert graph == ONNXRUNTIME_GRAPH or backend.silent  # a plain step reads no later nodes


@pytest.mark.slow
def test_drafts_that_overflow_change_no_drawn_text(poisoned: Exported) -> None:
    sampling = SamplingParams(temperature=0.9, top_k=20, seed=4)
    texts = []
    for kind in (OnnxRuntimeBackend, drafting_poison(OnnxRuntimeBackend)):
        backend = kind(poisoned.bundle, graph=poisoned.bundle.graph)
        engine = MedusaEngine(poisoned.bundle, backend, None)
        texts += [engine.generate(PROMPTS[0], max_new_tokens=NEW, tree_size=size, sampling=sampling, logprobs=True)
                  for size in (1, 5)]  # fmt: skip
    assert len({text.token_ids for text in texts}) == 1
    for text in texts[1:]:
        assert text.logprobs == pytest.approx(texts[0].logprobs, abs=1e-4)


def test_padding_that_overflows_changes_nothing(poisoned: Exported, right: list[list[int]]) -> None:
    """Token 0 pads chunks, and trees behind a plain step."""
    for graph in GRAPHS:
        engine = MedusaEngine(
            poisoned.bundle, OnnxRuntimeBackend(poisoned.bundle, graph=poisoned.bundle.folder / graph), None
        )
        for size in (1, 9):
            result = engine.generate(PROMPTS[1], max_new_tokens=NEW, tree_size=size, prefill_chunk=4)
            assert list(result.token_ids) == right[1]


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_request_that_overflows_ends_by_name_and_reaches_no_other(
    poisoned: Exported, right: list[list[int]], graph: str
) -> None:
    engine = MedusaEngine(
        poisoned.bundle, OnnxRuntimeBackend(poisoned.bundle, graph=poisoned.bundle.folder / graph), None
    )
    for place in (0, 3, 20, 29):
        prompt = [5] * 30
        prompt[place] = POISON
        with pytest.raises(NotFiniteError, match=r"not finite numbers.*float32\. Check its weights"):
            engine.generate(prompt, max_new_tokens=4, prefill_chunk=8)
        for size in (1, 9):
            result = engine.generate(PROMPTS[2], max_new_tokens=NEW, tree_size=size)
            assert list(result.token_ids) == right[2]


def until_overflow(engine: MedusaEngine, prompt: list[int], size: int) -> list[int]:
    """The tokens of an answer that ends with ``NotFiniteError``."""
    tokens: list[int] = []
    try:
        for chunk in engine.stream(prompt, max_new_tokens=64, tree_size=size):
            tokens += chunk.token_ids
    except NotFiniteError:
        return tokens
    raise AssertionError("no logits of it are infinite")


def test_a_token_that_overflows_is_the_last_one(poisoned: Exported) -> None:
    """Every tree gives the tokens that plain decoding emits before its logits are not finite."""
    heads = poisoned.step.model.get_output_embeddings().weight
    kept = heads.clone()
    texts = []
    try:
        with torch.no_grad():
            heads[POISON] = 30 * kept[11]  # now it is chosen sometimes
        for size in (1, 5, 9):
            engine = MedusaEngine(poisoned.bundle, EagerBackend(poisoned.step), None)
            texts.append(until_overflow(engine, PROMPTS[0], size))
    finally:
        with torch.no_grad():
            heads.copy_(kept)
    assert texts[0][-1] == POISON
    assert texts == [texts[0]] * 3


@pytest.mark.parametrize("graph", [GRAPH, None], ids=["standard", "derived"])
def test_a_service_answers_all_but_the_request_that_overflows(
    poisoned: Exported, right: list[list[int]], graph: str | None
) -> None:
    path = None if graph is None else poisoned.bundle.folder / graph
    backend = drafting_poison(OnnxRuntimeBackend)(poisoned.bundle, rows=3, graph=path)
    with MedusaService(poisoned.bundle, backend, None, tree_size=5) as service:
        for _ in range(4):
            # Rows share prefixes, are copied and moved, and get new requests.
            bad = [service.submit([*PROMPTS[0], *[8] * length, POISON, 4], max_new_tokens=4) for length in (0, 40, 90)]
            good = [service.submit(prompt, max_new_tokens=NEW) for prompt in (*PROMPTS, *PROMPTS[::-1])]
            assert [list(handle.result(60).token_ids) for handle in good] == [*right, *right[::-1]]
            for handle in bad:
                with pytest.raises(NotFiniteError):
                    handle.result(60)
    assert backend.silent


def make_backend(bundle: Bundle, name: str) -> Any:
    """A backend with two rows, the second of which is the one to test."""
    return OnnxRuntimeBackend(bundle, rows=2, graph=bundle.folder / name)


def poison_all_but_entries(backend: Any, margin: int, values: np.ndarray) -> None:
    """Writes values, [2L], to all slots of row 1 without an entry, and to its pending slots before entry 0."""
    length = int(backend.lengths[1])
    (caches,) = backend._store.row(1)
    for part in (caches[:, :, :margin], caches[:, :, margin + length :]):
        part[:] = values[:, None, None, None]
    for pending in backend._state.pending:
        pending[1, :, : max(0, margin - length)] = values[0]


@settings(max_examples=30)
@given(data=st.data())
@pytest.mark.slow
def test_what_a_row_holds_besides_its_entries_reaches_no_step(tiny_bundle: Bundle, data: st.DataObject) -> None:
    """With any values there, the step or its retry gives the result of a clean row."""
    name = data.draw(st.sampled_from([GRAPH, ONNXRUNTIME_BATCH_GRAPH]))
    prompt = data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    layers = 2 * tiny_bundle.model.num_layers
    values = np.array(data.draw(st.lists(st.sampled_from([*WRONG, 0.5]), min_size=layers, max_size=layers)))
    margin = tiny_bundle.tree.max_depth
    emitted = []
    for poison in (False, True):
        backend = make_backend(tiny_bundle, name)
        backend.reserve(128)
        tokens = backend.step(max(9, len(prompt)), {0: [1], 1: prompt}).emitted(1)[0]
        for size in sizes:
            if poison:
                poison_all_but_entries(backend, margin, values)
            result = backend.step(size)
            if not result.count[1]:
                assert poison
                backend.scrub(1)
                result = backend.step(size)
            tokens += result.emitted(1)[0]
        assert len(tokens) > len(sizes)
        emitted.append(tokens)
    common = min(map(len, emitted))  # a step that is tried again has other drafts
    assert emitted[0][:common] == emitted[1][:common]


@pytest.mark.parametrize("kind", ["eager", GRAPH, ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH])
def test_a_silent_row_keeps_its_state(poisoned: Exported, kind: str) -> None:
    bundle = poisoned.bundle
    backend: Any = EagerBackend(poisoned.step) if kind == "eager" else None
    backend = backend or OnnxRuntimeBackend(bundle, graph=bundle.folder / kind)
    backend.reserve(128)
    first = backend.step(len(PROMPTS[1]), {0: PROMPTS[1]}).emitted(0)[0]
    backend.drafts[0, 0] = POISON  # a root that overflows: no token can be emitted
    length = int(backend.lengths[0])
    for size in (1, 5, 9):
        result = backend.step(size)
        assert result.count[0] == 0
        assert int(backend.lengths[0]) == length
        assert backend.drafts[0, 0] == POISON
        backend.scrub(0)
    backend.drafts[0, 0] = first[0]
    clean: Any = EagerBackend(poisoned.step)
    clean.reserve(128)
    clean.step(len(PROMPTS[1]), {0: PROMPTS[1]})
    assert backend.step(1).emitted(0)[0] == clean.step(1).emitted(0)[0]


@pytest.mark.slow
def test_half_precision_that_overflows_is_told_to_export_fp32(stock: Stock) -> None:
    model = tiny_model("llama", seed=2)
    with torch.no_grad():
        # Of a constant embedding the first value is 64 · 2,000 after the norm, which exceeds 65,504; others get 16,000.
        model.get_input_embeddings().weight[POISON] = 1.0
        model.model.layers[0].self_attn.v_proj.weight[0] = 2_000.0
    step = make_step(model.half(), random_heads(model))
    step.sampling = False  # such a graph is traced in half the time
    bundle = Bundle.load(stock.folder("overflowing-half", lambda out: export(step, out, trained=True)))
    answers = []
    with MedusaEngine.load(bundle.folder) as engine:
        for prompt in ([4, 5, 6], [4, POISON, 6], [4, 5, 6]):
            if POISON in prompt:
                with pytest.raises(NotFiniteError, match=r"float16\. Export it in fp32"):
                    engine.generate(prompt, max_new_tokens=4)
            else:
                answers.append(engine.generate(prompt, max_new_tokens=8, tree_size=9).token_ids)
    assert answers[0] == answers[1]

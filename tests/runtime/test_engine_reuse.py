"""An engine reuses the entries of its last request, on every backend, and answers like a fresh engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from medusa_export.step.eager import EagerBackend
from medusa_runtime import BackendError, Bundle, MedusaEngine, NotFiniteError, SamplingParams
from medusa_runtime.backends.base import Backend, StepResult
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.compiled import CompiledEngine
from medusa_runtime.text.tokenizer import Tokenizer
from support.machine import Machine
from support.on_host import OnnxRuntimeOnHost
from support.stock import Stock

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]
KINDS: tuple[Any, ...] = (
    *("onnxruntime", "onnxruntime-cuda", "tensorrt-rtx"),
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("standard graph", "eager")),
)
Opener = Callable[[str], Backend]


@pytest.fixture(scope="module")
def fresh(tiny_bundle: Bundle) -> Callable[..., tuple[int, ...]]:
    """Answers of an engine without reusable entries; each is computed once for all kinds of backends."""
    backend = OnnxRuntimeBackend(tiny_bundle, threads=1)
    tokenizer = Tokenizer.load(tiny_bundle.listed)
    known: dict[str, tuple[int, ...]] = {}

    def answer(prompt: object, **options: Any) -> tuple[int, ...]:
        asked = repr((prompt, options))
        if asked not in known:
            result = MedusaEngine(tiny_bundle, backend, tokenizer).generate(prompt, **options)
            assert result.stats.cached_tokens == 0
            known[asked] = result.token_ids
        return known[asked]

    return answer


@pytest.fixture
def opened(tiny_bundle: Bundle, tiny_engine: CompiledEngine, stock: Stock) -> Opener:
    openers: dict[str, Callable[[], Backend]] = {
        "onnxruntime": lambda: OnnxRuntimeBackend(tiny_bundle, threads=1),
        "standard graph": lambda: OnnxRuntimeBackend(tiny_bundle, threads=1, graph=tiny_bundle.graph),
        "onnxruntime-cuda": lambda: OnnxRuntimeOnHost(tiny_bundle, threads=1),
        "tensorrt-rtx": Machine(tiny_bundle, tiny_engine).backend,
        "eager": lambda: EagerBackend(stock.export().step),
    }
    return lambda kind: openers[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lookup", [True, False])
def test_a_second_turn_computes_only_what_is_new(
    tiny_bundle: Bundle, opened: Opener, fresh: Callable[..., tuple[int, ...]], kind: str, lookup: bool
) -> None:
    for sampling in (None, SamplingParams(temperature=0.9, seed=7)):
        engine = MedusaEngine(tiny_bundle, opened(kind), None)
        tokens, reused = list(PROMPT), 0
        for size in (9, 1, 4):
            options = {"max_new_tokens": 14, "sampling": sampling, "lookup": lookup}
            result = engine.generate(tokens, tree_size=size, **options)
            assert result.token_ids == fresh(tokens, tree_size=4, **options)
            # The last token of an answer has no entry yet, as no step has taken it in.
            assert result.stats.cached_tokens == reused
            reused = len(tokens) + 13
            tokens += [*result.token_ids, 3, 4, 5]
        engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_another_prompt_reuses_what_both_begin_with(
    tiny_bundle: Bundle, opened: Opener, fresh: Callable[..., tuple[int, ...]], kind: str
) -> None:
    engine = MedusaEngine(tiny_bundle, opened(kind), None)
    for length, reused in ((13, 0), (9, 9), (0, 0), (5, 0)):
        prompt = [*PROMPT[:length], 50 + length, 8, 9]
        result = engine.generate(prompt, max_new_tokens=20, tree_size=9)
        assert result.stats.cached_tokens == reused
        assert result.token_ids == fresh(prompt, max_new_tokens=20)
    again = engine.generate(prompt, max_new_tokens=20, tree_size=4)  # the last token of a prompt is always computed
    assert again.stats.cached_tokens == len(prompt) - 1
    assert again.token_ids == result.token_ids
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_after_a_stop_in_the_middle_of_a_step(
    tiny_bundle: Bundle, opened: Opener, fresh: Callable[..., tuple[int, ...]], kind: str
) -> None:
    """The row has entries of tokens behind the stop, and of a step in flight: they are cut."""
    engine = MedusaEngine(tiny_bundle, opened(kind), Tokenizer.load(tiny_bundle.listed))
    whole = engine.generate("Hello", max_new_tokens=30, tree_size=1)
    prompt = engine.tokenizer.encode("Hello")
    for count in range(5, 12):
        for options in ({"stop": whole.text[count : count + 2]}, {"stop_token_ids": [whole.token_ids[count]]}):
            for lookup in (True, False):
                first = engine.generate("Hello", max_new_tokens=30, tree_size=9, lookup=lookup, **options)
                tokens = [*prompt, *first.token_ids, 3, 4]
                result = engine.generate(tokens, max_new_tokens=10, tree_size=9, lookup=lookup)
                assert result.stats.cached_tokens >= len(prompt) + len(first.token_ids) - 1
                assert result.token_ids == fresh(tokens, max_new_tokens=10)
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_turn_after_a_stream_that_was_left(
    tiny_bundle: Bundle, opened: Opener, fresh: Callable[..., tuple[int, ...]], kind: str
) -> None:
    engine = MedusaEngine(tiny_bundle, opened(kind), None)
    for chunks in range(5):
        stream = engine.stream(PROMPT, max_new_tokens=30, tree_size=4, prefill_chunk=5, lookup=False)
        tokens = [*PROMPT, *(token for _ in range(chunks) for token in next(stream).token_ids), 3, 4]
        result = engine.generate(tokens, max_new_tokens=10, tree_size=9)
        assert result.token_ids == fresh(tokens, max_new_tokens=10)
        assert result.stats.cached_tokens >= (len(tokens) - 3 if chunks else 0)
    engine.close()


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("error", [BackendError("broken"), OSError("broken"), KeyboardInterrupt()], ids=repr)
def test_nothing_is_reused_after_a_step_that_failed(
    tiny_bundle: Bundle,
    opened: Opener,
    fresh: Callable[..., tuple[int, ...]],
    kind: str,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = opened(kind)
    engine = MedusaEngine(tiny_bundle, backend, None)
    stream = engine.stream(PROMPT, max_new_tokens=50, tree_size=4)
    tokens = [*PROMPT, *next(stream).token_ids]

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(backend, "step", fail)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else BackendError):
            next(stream)
    result = engine.generate(tokens, max_new_tokens=10, tree_size=4)
    assert result.stats.cached_tokens == 0
    assert result.token_ids == fresh(tokens, max_new_tokens=10)


def test_nothing_is_reused_after_logits_that_are_not_finite(
    tiny_bundle: Bundle, opened: Opener, fresh: Callable[..., tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened("onnxruntime")
    engine = MedusaEngine(tiny_bundle, backend, None)
    stream = engine.stream(PROMPT, max_new_tokens=50, tree_size=4)
    tokens = [*PROMPT, *next(stream).token_ids]
    step = backend.step

    def silent(*arguments: Any) -> StepResult:
        result = step(*arguments)
        result.count[:] = 0
        return result

    with monkeypatch.context() as patch:
        patch.setattr(backend, "step", silent)
        with pytest.raises(NotFiniteError):
            next(stream)
    result = engine.generate(tokens, max_new_tokens=10, tree_size=4)
    assert result.stats.cached_tokens == 0
    assert result.token_ids == fresh(tokens, max_new_tokens=10)


def test_engines_that_share_a_backend_reuse_no_entries_of_each_other(
    tiny_bundle: Bundle, fresh: Callable[..., tuple[int, ...]]
) -> None:
    backend = OnnxRuntimeBackend(tiny_bundle, threads=1)
    first, second = (MedusaEngine(tiny_bundle, backend, None) for _ in range(2))
    other = [token + 1 for token in PROMPT]
    for engine, prompt in ((first, PROMPT), (second, other), (first, [*PROMPT, 5]), (second, [*other, 5])):
        result = engine.generate(prompt, max_new_tokens=12, tree_size=4)
        assert result.stats.cached_tokens == 0
        assert result.token_ids == fresh(prompt, max_new_tokens=12)


def test_steps_behind_the_engines_back_are_noticed(tiny_bundle: Bundle, fresh: Callable[..., tuple[int, ...]]) -> None:
    engine = MedusaEngine(tiny_bundle, OnnxRuntimeBackend(tiny_bundle, threads=1), None)
    engine.generate(PROMPT, max_new_tokens=12, tree_size=4)
    engine.backend.reset(0)
    engine.backend.step(9, {0: [5] * 9})
    result = engine.generate([*PROMPT, 5], max_new_tokens=12, tree_size=4)
    assert result.stats.cached_tokens == 0
    assert result.token_ids == fresh([*PROMPT, 5], max_new_tokens=12)

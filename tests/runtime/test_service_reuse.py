"""A service keeps the entries of ended requests for later ones, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from medusa_runtime import (
    Bundle,
    MedusaEngine,
    MedusaService,
    RequestError,
)
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from support.gate import AnyGate
from support.prompts import PROMPT
from support.rig import KINDS, Rig, rig_of


@pytest.fixture(scope="module", params=KINDS)
def rig(request: pytest.FixtureRequest, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_of(request.param, tiny_bundle, tmp_path_factory.mktemp("engine")) as rig:
        yield rig


def test_what_requests_share_is_not_computed_again(service: MedusaService, engine: MedusaEngine, gate: AnyGate) -> None:
    system = [(11 * i + 1) % 100 + 1 for i in range(40)]
    first = service.generate([*system, 5, 6, 7], max_new_tokens=10)
    assert first.stats.cached_tokens == 0
    for tail in ([8, 9], [10, 11, 12], [8, 9, 10]):
        result = service.generate([*system, *tail], max_new_tokens=10)
        assert result.stats.cached_tokens >= 40
        assert result.token_ids == engine.generate([*system, *tail], max_new_tokens=10).token_ids
    running = service.submit([*system, 20, 21], max_new_tokens=200)
    other = service.generate([*system, 22], max_new_tokens=10)  # from a row that runs
    assert other.stats.cached_tokens == 40
    assert other.token_ids == engine.generate([*system, 22], max_new_tokens=10).token_ids
    assert running.result(30).token_ids == engine.generate([*system, 20, 21], max_new_tokens=200).token_ids


def test_a_conversation_goes_on_where_it_ended(service: MedusaService, engine: MedusaEngine) -> None:
    tokens = list(PROMPT)
    for turn in range(4):
        result = service.generate(tokens, max_new_tokens=12)
        assert result.token_ids == engine.generate(tokens, max_new_tokens=12).token_ids
        if turn:
            assert result.stats.cached_tokens >= len(tokens) - 4 - 1
        tokens += [*result.token_ids, 3, 4, 5]


def test_standard_graph_shares_too(tiny_bundle: Bundle, engine: MedusaEngine) -> None:
    """In a graph with pending entries these come to their slots before rows are copied or cut."""
    backend = OnnxRuntimeBackend(tiny_bundle, rows=3, threads=1, graph=tiny_bundle.graph)
    rng = np.random.default_rng(3)
    with MedusaService(tiny_bundle, backend, None, tree_size=9, prefill_chunk=5) as service:
        known: list[list[int]] = [[1]]
        for _ in range(40):
            base = known[int(rng.integers(len(known)))]
            prompt = [*base[: int(rng.integers(1, len(base) + 1))], *rng.integers(1, 101, 3).tolist()]
            handles = [service.submit(prompt, max_new_tokens=15) for _ in range(2)]
            expected = engine.generate(prompt, max_new_tokens=15).token_ids
            assert [handle.result(30).token_ids for handle in handles] == [expected] * 2
            known.append([*prompt, *expected])


def test_nothing_is_kept_of_requests_that_ended(service: MedusaService) -> None:
    handle = service.submit(PROMPT, max_new_tokens=5)
    handle.result(30)
    gone = weakref.ref(handle)
    for _ in range(2):
        service.generate(PROMPT, max_new_tokens=2)
    del handle
    gc.collect()
    assert gone() is None


def test_a_session_computes_only_what_is_new(service: MedusaService, engine: MedusaEngine) -> None:
    session = service.session([{"role": "system", "content": "Be brief."}])
    said = list(session.messages)
    for turn, text in enumerate(("Hi", "And then?", "Why?")):
        result = session.send(text, max_new_tokens=10)
        said.append({"role": "user", "content": text})
        alone = engine.generate(said, max_new_tokens=10)
        assert result.token_ids == alone.token_ids
        said.append({"role": "assistant", "content": alone.text})
        # The model's tokens and those of its text differ at most from the beginning of the answer on.
        assert turn == 0 or result.stats.cached_tokens >= 20
    assert session.messages == said
    with pytest.raises(RequestError):
        session.send("x" * 600)
    assert session.messages == said
    assert asyncio.run(session.asend("Bye", max_new_tokens=5)).stats.cached_tokens > 20


def test_prompts_of_many_lengths_leave_nothing_behind(tiny_bundle: Bundle) -> None:
    backend = OnnxRuntimeBackend(tiny_bundle, rows=2, threads=1)
    with MedusaService(tiny_bundle, backend, None, tree_size=4) as service:
        for length in range(1, 60):
            service.generate([7] * length, max_new_tokens=2)
        assert len(backend._state._by_width) <= 2 * (tiny_bundle.tree.size + 1)
        assert len(backend._windows) <= 4

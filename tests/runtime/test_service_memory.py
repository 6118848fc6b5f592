"""Steps of a service that fail, and memory that is missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from medusa_runtime import (
    BackendError,
    Bundle,
    MedusaEngine,
    MedusaService,
    Metrics,
    ServiceClosedError,
)
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from support.decoding import TREE
from support.gate import Gate
from support.prompts import PROMPT


def test_a_step_that_fails_ends_the_request_that_caused_it(
    service: MedusaService, gate: Gate, engine: MedusaEngine
) -> None:
    def fail(size: int, prompts: dict[int, list[int]], rows: Sequence[int]) -> None:
        if not prompts and any(gate.inner.lengths[row] == bad for row in rows):
            raise RuntimeError("a kernel failed")

    victim, other = [5] * 60, [7] * 11  # the other request never gets this long
    bad = len(victim) + 2
    gate.fail = fail
    service._thread.loop.sizes.tree_size = 1  # so that the victim reaches that length
    handles = [service.submit(prompt, max_new_tokens=30) for prompt in (victim, other)]
    with pytest.raises(BackendError, match="a kernel failed"):
        handles[0].result(30)
    assert handles[1].result(30).token_ids == engine.generate(other, max_new_tokens=30).token_ids
    gate.fail = lambda *_: None
    again = service.generate(victim, max_new_tokens=30)
    assert again.token_ids == engine.generate(victim, max_new_tokens=30).token_ids


def test_a_prompt_that_fails_ends_its_request_only(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    def fail(size: int, prompts: dict[int, list[int]], rows: Sequence[int]) -> None:
        if any(13 in chunk for chunk in prompts.values()):
            raise BackendError("no thirteens")

    gate.fail = fail
    good = service.submit([5] * 30, max_new_tokens=40)
    with pytest.raises(BackendError, match="thirteens"):
        service.generate([7] * 20 + [13], max_new_tokens=5)
    assert good.result(30).token_ids == engine.generate([5] * 30, max_new_tokens=40).token_ids


def test_no_memory_while_a_cache_grows(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    def fail_arrange(rows: Sequence[int], capacity: int) -> None:
        if capacity > 200:
            raise MemoryError

    gate.fail_arrange = fail_arrange
    long = service.submit([9] * 150, max_new_tokens=300)
    short = service.submit([3] * 10, max_new_tokens=60)
    with pytest.raises(BackendError, match="no room"):
        long.result(30)
    assert short.result(30).token_ids == engine.generate([3] * 10, max_new_tokens=60).token_ids
    with pytest.raises(BackendError, match="no room"):
        service.generate([9] * 220)
    assert len(service.generate([9] * 100, max_new_tokens=20).token_ids) == 20


def test_entries_of_free_rows_are_evicted_where_room_is_needed(
    service: MedusaService, gate: Gate, engine: MedusaEngine
) -> None:
    """A request without room gets the room of prefixes that no request uses."""
    service.generate([7] * 250, max_new_tokens=2)
    lengths = gate.inner.lengths

    def fail_arrange(rows: Sequence[int], capacity: int) -> None:
        if capacity > 60 and lengths.max() > 200:
            raise MemoryError

    gate.fail_arrange = fail_arrange
    result = service.generate([9] * 100, max_new_tokens=5)
    assert result.token_ids == engine.generate([9] * 100, max_new_tokens=5).token_ids
    assert lengths.max() < 200


def test_no_memory_to_step_together(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    """Rows that can't be brought together step alone."""

    def fail_arrange(rows: Sequence[int], capacity: int) -> None:
        if len(rows) > 1:
            raise MemoryError

    gate.fail_arrange = fail_arrange
    prompts = [[9] * 30, [3] * 10]
    handles = [service.submit(prompt, max_new_tokens=40) for prompt in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        assert handle.result(30).token_ids == engine.generate(prompt, max_new_tokens=40).token_ids


def test_no_memory_for_entries_that_are_copied(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    gate.open.clear()
    first = service.submit([*[9] * 40, 1], max_new_tokens=300)
    gate.entered.acquire(timeout=30)
    gate.open.set()
    next(first)
    taken = []

    def fail_arrange(rows: Sequence[int], capacity: int) -> None:
        if len(rows) == 1 and rows != [0] and not taken:
            taken.append(capacity)
            raise MemoryError

    gate.fail_arrange = fail_arrange
    with pytest.raises(BackendError, match="no room"):
        service.generate([*[9] * 40, 2], max_new_tokens=5)
    assert taken == [TREE.max_depth + 40 + 1]  # the failure came while its prefix was copied
    again = service.generate([*[9] * 40, 2], max_new_tokens=5)
    assert again.token_ids == engine.generate([*[9] * 40, 2], max_new_tokens=5).token_ids
    assert first.result(30).token_ids == engine.generate([*[9] * 40, 1], max_new_tokens=300).token_ids


@pytest.mark.parametrize("rows", [[0, 1], [1]])
@pytest.mark.parametrize("standard", [True, False])
def test_a_failed_step_leaves_rows_as_they_were(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, standard: bool, rows: list[int]
) -> None:
    backend = OnnxRuntimeBackend(tiny_bundle, rows=2, threads=1, graph=tiny_bundle.graph if standard else None)
    backend.step(9, {0: PROMPT[:9], 1: PROMPT[1:9]})
    backend.step(4)
    run = backend._session.run_with_iobinding

    def run_and_fail(binding: object) -> None:
        run(binding)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(backend._session, "run_with_iobinding", run_and_fail)
    before = [array.copy() for array, _ in backend._state._next]
    with pytest.raises(BackendError, match="failed in a step of 9 tokens"):
        backend.step(9, {}, rows)
    assert all(np.array_equal(array, old) for (array, _), old in zip(backend._state._next, before, strict=True))


def test_a_service_that_fails_inside_answers_all(
    tiny_bundle: Bundle, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    metrics = Metrics()
    metrics.load = lambda *figures: seen.append(figures)
    service = MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=metrics)
    assert (service.state, service.failure) == ("ready", None)
    monkeypatch.setattr(service._thread.scheduler, "remove", lambda *_: 1 / 0)
    handles = [service.submit(PROMPT) for _ in range(4)]
    for handle in handles:
        with pytest.raises(BackendError, match="failed and is closed") as caught:
            handle.result(30)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    service._thread.thread.join(30)
    assert service.state == "failed" and isinstance(service.failure, ZeroDivisionError)
    assert seen[-1] == (0, 0)
    assert gate.inner.capacity == 0
    with pytest.raises(ServiceClosedError, match="has failed: ZeroDivisionError"):
        service.submit(PROMPT)
    assert service.drain(30)
    service.close()
    assert service.state == "failed"

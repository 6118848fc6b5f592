"""The queue of a service: its bound, priorities, cancellation, deadlines and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from medusa_runtime import (
    Bundle,
    DeadlineError,
    MedusaEngine,
    MedusaService,
    QueueFullError,
    RequestCancelledError,
    ServiceClosedError,
)
from support.gate import AnyGate
from support.prompts import PROMPT
from support.rig import KINDS, Rig, rig_of


@pytest.fixture(scope="module", params=KINDS)
def rig(request: pytest.FixtureRequest, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_of(request.param, tiny_bundle, tmp_path_factory.mktemp("engine")) as rig:
        yield rig


def test_a_full_queue_refuses_at_once(service: MedusaService, gate: AnyGate) -> None:
    gate.open.clear()
    handles = [service.submit(PROMPT, max_new_tokens=3) for _ in range(gate.rows + 2)]  # two wait
    with pytest.raises(QueueFullError, match="as many as this service takes"):
        service.submit(PROMPT)
    handles[-1].cancel()
    gate.open.set()
    with pytest.raises(RequestCancelledError):
        handles[-1].result(30)
    assert all(len(handle.result(30).token_ids) == 3 for handle in handles[:-1])


def test_priority_goes_first(service: MedusaService, gate: AnyGate) -> None:
    gate.open.clear()
    first = [service.submit(PROMPT, max_new_tokens=2) for _ in range(gate.rows)]
    gate.entered.acquire(timeout=30)  # they run
    order: list[str] = []
    low = service.submit(PROMPT, max_new_tokens=30, on_chunk=lambda _: order.append("low"))
    high = service.submit(PROMPT, max_new_tokens=1, priority=1, on_chunk=lambda _: order.append("high"))
    gate.open.set()
    assert all(handle.result(30) for handle in (*first, low, high))
    assert high.stats.queue_seconds <= low.stats.queue_seconds


def test_cancel_while_it_waits_and_while_it_runs(service: MedusaService, gate: AnyGate, engine: MedusaEngine) -> None:
    gate.open.clear()
    running, other, *_, waiting = (service.submit(PROMPT, max_new_tokens=400) for _ in range(gate.rows + 1))
    gate.entered.acquire(timeout=30)
    waiting.cancel()
    running.cancel()
    running.cancel()
    gate.open.set()
    for handle in (running, waiting):
        with pytest.raises(RequestCancelledError):
            handle.result(30)
        with pytest.raises(RequestCancelledError):
            list(handle)
    assert not other.done or other.result()
    other.cancel()
    with pytest.raises(RequestCancelledError):
        other.result(30)
    result = service.generate(PROMPT, max_new_tokens=5)
    assert result.token_ids == engine.generate(PROMPT, max_new_tokens=5).token_ids
    other.cancel()  # of no effect


def test_deadlines_run_in_the_queue_and_in_a_row(tiny_bundle: Bundle, gate: AnyGate) -> None:
    now = [1000.0]
    with MedusaService(tiny_bundle, gate, None, tree_size=1, clock=lambda: now[0]) as service:
        gate.open.clear()
        late = service.submit(PROMPT, max_new_tokens=400, timeout=5)
        fine = service.submit(PROMPT, max_new_tokens=10, timeout=50)
        queued = service.submit(PROMPT, max_new_tokens=10, timeout=5)
        gate.entered.acquire(timeout=30)
        now[0] += 6
        gate.open.set()
        for handle in (late, queued):
            with pytest.raises(DeadlineError, match="in 5 s"):
                handle.result(30)
        assert len(fine.result(30).token_ids) == 10
        assert isinstance(DeadlineError("x"), TimeoutError)


@pytest.mark.parametrize("jump", [1e6, -1e6])
def test_a_clock_that_jumps(tiny_bundle: Bundle, gate: AnyGate, jump: float) -> None:
    """A jump forwards ends requests with a deadline, a jump back ends none. Requests without one go on."""
    now = [5e6]
    with MedusaService(tiny_bundle, gate, None, tree_size=1, clock=lambda: now[0]) as service:
        gate.open.clear()
        timed = service.submit(PROMPT, max_new_tokens=30, timeout=60)
        free = service.submit(PROMPT, max_new_tokens=30)
        gate.entered.acquire(timeout=30)
        now[0] += jump
        gate.open.set()
        assert len(free.result(30).token_ids) == 30
        if jump > 0:
            with pytest.raises(DeadlineError):
                timed.result(30)
        else:
            assert len(timed.result(30).token_ids) == 30
        for stats in (timed.stats, free.stats):
            assert min(stats.queue_seconds, stats.prefill_seconds, stats.decode_seconds) >= 0
        assert len(service.generate(PROMPT, max_new_tokens=5, timeout=60).token_ids) == 5
        assert service.load_figures == (0, 0)


def test_the_clock_of_the_wall_may_jump(shared: MedusaService, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = shared.submit(PROMPT, max_new_tokens=100, timeout=60)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert len(handle.result(60).token_ids) == 100


def test_cancelling_takes_no_lock(service: MedusaService, gate: AnyGate) -> None:
    """A garbage collector may cancel in any thread, which may hold any lock."""
    gate.open.clear()
    handle = service.submit(PROMPT, max_new_tokens=400)
    assert gate.entered.acquire(timeout=30)
    with service._thread.changed:
        thread = threading.Thread(target=handle.cancel)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    gate.open.set()
    with pytest.raises(RequestCancelledError):
        handle.result(30)


def test_drain_and_close(tiny_bundle: Bundle, rig: Rig, gate: AnyGate) -> None:
    service = MedusaService(tiny_bundle, gate, None, tree_size=4)
    gate.open.clear()
    handle = service.submit(PROMPT, max_new_tokens=30)
    assert not service.drain(0.01)
    with pytest.raises(ServiceClosedError):
        service.submit(PROMPT)
    gate.open.set()
    assert service.drain(30)
    assert handle.done and len(handle.result().token_ids) == 30
    service.close()
    service.close()

    gate = rig.gate()
    service = MedusaService(tiny_bundle, gate, None, tree_size=4)
    gate.open.clear()
    handles = [service.submit(PROMPT, max_new_tokens=400) for _ in range(5)]
    closing = threading.Thread(target=service.close)
    closing.start()
    time.sleep(0.05)
    gate.open.set()
    for handle in handles:
        with pytest.raises(ServiceClosedError):
            handle.result(30)
    closing.join(30)
    assert gate.is_closed

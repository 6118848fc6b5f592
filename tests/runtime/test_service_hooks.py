"""Hooks for metrics that close the service, cancel requests, submit some, or raise."""

from __future__ import annotations

import pytest

from medusa_runtime import (
    Bundle,
    MedusaEngine,
    MedusaService,
    Metrics,
    RequestCancelledError,
    RequestHandle,
    ServiceClosedError,
)
from support.gate import Gate
from support.prompts import PROMPT


def test_a_hook_may_close_the_service(tiny_bundle: Bundle, gate: Gate) -> None:
    class Impatient(Metrics):
        def ended(self, *_: object) -> None:
            service.close()

    service = MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=Impatient())
    first = service.submit(PROMPT, max_new_tokens=3)
    second = service.submit(PROMPT, max_new_tokens=400)
    assert len(first.result(30).token_ids) == 3
    with pytest.raises(ServiceClosedError):
        second.result(30)
    service.close()
    assert gate.inner.capacity == 0


def test_a_hook_may_cancel_other_requests(tiny_bundle: Bundle, gate: Gate, engine: MedusaEngine) -> None:
    class Family(Metrics):
        """All go where one goes."""

        def ended(self, reason: str, *_: object) -> None:
            if reason == "RequestCancelledError":
                for handle in handles:
                    handle.cancel()

    with MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=Family()) as service:
        gate.open.clear()
        handles = [service.submit(PROMPT, max_new_tokens=400) for _ in range(4)]
        assert gate.entered.acquire(timeout=30)
        handles[0].cancel()
        gate.open.set()
        for handle in handles:
            with pytest.raises(RequestCancelledError):
                handle.result(30)
        assert (
            service.generate(PROMPT, max_new_tokens=5).token_ids == engine.generate(PROMPT, max_new_tokens=5).token_ids
        )


def test_a_hook_may_close_an_idle_service_or_give_it_work(tiny_bundle: Bundle, gate: Gate) -> None:
    done: list[RequestHandle] = []

    class Restless(Metrics):
        def load(self, waiting: int, running: int) -> None:
            if not hasattr(self, "service"):
                return
            if not done:
                done.append(self.service.submit(PROMPT, max_new_tokens=3))
            elif done[0].done and not running:
                self.service.close()

    metrics = Restless()
    service = MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=metrics)
    metrics.service = service
    service.submit(PROMPT, max_new_tokens=3).result(30)
    service._thread.thread.join(30)
    assert not service._thread.thread.is_alive()
    assert len(done[0].result(0).token_ids) == 3
    assert gate.inner.capacity == 0


def test_hooks_that_raise_harm_nobody(tiny_bundle: Bundle, gate: Gate) -> None:
    class Broken(Metrics):
        def step(self, *_: object) -> None:
            raise ValueError

        def ended(self, *_: object) -> None:
            raise ValueError

    with MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=Broken()) as service:
        assert len(service.generate(PROMPT, max_new_tokens=10).token_ids) == 10

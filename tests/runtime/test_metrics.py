"""Figures for Prometheus: of one service, of several in one process, and names that clash."""

from __future__ import annotations

import pytest

from medusa_runtime import Bundle, DeadlineError, MedusaError, MedusaService, PrometheusMetrics
from support.gate import Gate

prometheus_client = pytest.importorskip("prometheus_client")
from prometheus_client import CollectorRegistry, Gauge, generate_latest  # noqa: E402

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]


def test_metrics(tiny_bundle: Bundle) -> None:
    metrics, registry = PrometheusMetrics.in_own_registry()
    with MedusaService.load(
        tiny_bundle.folder, rows=2, threads=1, max_queue=0, tree_size=4, metrics=metrics
    ) as service:
        service.generate(PROMPT, max_new_tokens=10)
        assert f'medusa_tokens_total{{kind="prompt"}} {len(PROMPT)}.0' in generate_latest(registry).decode()
        # The tokens of the answer: its first token comes from prefill, and the last step may emit more than are wanted.
        assert 'medusa_tokens_total{kind="completion"} 10.0' in generate_latest(registry).decode()
        with pytest.raises(DeadlineError):
            service.generate(PROMPT, max_new_tokens=400, timeout=0.001)
    page = generate_latest(registry).decode()
    assert 'medusa_requests_total{outcome="length"} 1.0' in page
    assert 'medusa_requests_total{outcome="DeadlineError"} 1.0' in page
    assert "medusa_queue_seconds_count" in page


def test_two_services_count_together() -> None:
    """The objects of two services once registered the same names."""
    registry = CollectorRegistry()
    first, second = PrometheusMetrics(registry), PrometheusMetrics(registry)
    first.rejected()
    second.rejected()
    first.load(3, 2)
    second.load(1, 1)
    assert registry.get_sample_value("medusa_requests_total", {"outcome": "rejected"}) == 2
    assert registry.get_sample_value("medusa_requests_waiting") == 4
    first.load(0, 0)
    assert registry.get_sample_value("medusa_requests_waiting") == 1
    assert registry.get_sample_value("medusa_requests_running") == 1


def test_in_the_default_registry_too() -> None:
    prefix = "medusa_test_default"
    first, second = PrometheusMetrics(prefix=prefix), PrometheusMetrics(prefix=prefix)
    first.load(1, 0)
    second.load(1, 0)
    assert prometheus_client.REGISTRY.get_sample_value(f"{prefix}_requests_waiting") == 2


def test_prefixes_and_registries_tell_services_apart() -> None:
    registry, other = CollectorRegistry(), CollectorRegistry()
    PrometheusMetrics(registry, "a").rejected()
    PrometheusMetrics(registry, "b").rejected()
    PrometheusMetrics(other, "a").rejected()
    for place, prefix in ((registry, "a"), (registry, "b"), (other, "a")):
        assert place.get_sample_value(f"{prefix}_requests_total", {"outcome": "rejected"}) == 1


def test_names_that_are_in_use_already() -> None:
    """After a failure no collector stays registered."""
    registry = CollectorRegistry()
    stranger = Gauge("medusa_requests_running", "somebody else's", registry=registry)
    with pytest.raises(MedusaError, match="Choose another prefix or registry"):
        PrometheusMetrics(registry)
    assert registry.get_sample_value("medusa_requests_waiting") is None
    registry.unregister(stranger)
    PrometheusMetrics(registry)
    assert registry.get_sample_value("medusa_requests_waiting") == 0


def test_collectors_that_were_unregistered_are_made_again() -> None:
    """Tests unregister collectors between each other."""
    registry = CollectorRegistry()
    PrometheusMetrics(registry)
    for collector in list(registry._collector_to_names):
        registry.unregister(collector)
    PrometheusMetrics(registry).load(2, 1)
    assert registry.get_sample_value("medusa_requests_waiting") == 2


@pytest.mark.parametrize("end", ["close", "fail"])
def test_no_load_is_left_of_a_service_that_ended(
    tiny_bundle: Bundle, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, registry = PrometheusMetrics.in_own_registry()
    gate = Gate(tiny_bundle, rows=2)
    service = MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=metrics)
    gate.open.clear()
    handles = [service.submit(PROMPT, max_new_tokens=400) for _ in range(5)]
    assert gate.entered.acquire(timeout=30)
    assert registry.get_sample_value("medusa_requests_running") >= 1
    if end == "fail":
        monkeypatch.setattr(service._thread.scheduler, "decoding", lambda: 1 / 0)
        monkeypatch.setattr(service._thread.scheduler, "remove", lambda *_: 1 / 0)
    else:
        service._thread._closing = True
    gate.open.set()
    for handle in handles:
        with pytest.raises(MedusaError):
            handle.result(30)
    service._thread.thread.join(30)
    assert registry.get_sample_value("medusa_requests_waiting") == 0
    assert registry.get_sample_value("medusa_requests_running") == 0
    assert service.state == ("failed" if end == "fail" else "closed")

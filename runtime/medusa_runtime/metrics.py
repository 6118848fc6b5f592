"""Metrics of a service: hooks that it calls while it runs, and counters for Prometheus."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

from medusa_runtime.errors import MedusaError
from medusa_runtime.request import Stats

# Seconds; from the step of a small model to the answer of a large one.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


_log = logging.getLogger(__name__)


class Metrics:
    """Hooks that do nothing: derive a class and override the hooks that you need.

    The service's own thread calls them, except ``rejected``, which is called in the thread that submits. They should
    return at once, and can't wait for the service. Exceptions that they raise are logged and have no other effect. Each
    service needs an object of its own.
    """

    def rejected(self) -> None:
        """The queue was full."""

    def load(self, waiting: int, running: int) -> None:
        """The number of requests that wait and run, before each step."""

    def step(self, kind: str, rows: int, size: int, tokens: int, seconds: float) -> None:
        """A step has ended.

        Args:
            kind: ``prefill`` or ``decode``.
            rows: Number of rows that took part.
            size: Tokens per row.
            tokens: Number of prompt tokens taken in, or of tokens emitted.
            seconds: Duration of the step.
        """

    def ended(self, outcome: str, stats: Stats) -> None:
        """A request has ended. ``outcome`` is its finish reason, or the name of the error's class."""


def call_hook(hook: Callable[..., None], *figures: object) -> None:
    """Calls a hook of ``Metrics`` and logs its exceptions."""
    try:
        hook(*figures)
    except (Exception, SystemExit):  # noqa: BLE001  # a user's code, which may call sys.exit
        _log.exception("A hook for metrics failed")


@dataclass(frozen=True)
class _Collectors:
    """The collectors of ``prometheus_client`` under one prefix in one registry."""

    requests: Any
    waiting: Any
    running: Any
    tokens: Any
    steps: Any
    accepted: Any
    queue: Any
    first: Any

    @classmethod
    def registered(cls, prometheus: Any, registry: Any, prefix: str) -> Self:
        """Registers new collectors.

        Raises:
            ValueError: The prefix is not a valid name, or the registry has one of these names already. Nothing is
                registered.
        """
        made = []

        def add(kind: Any, name: str, about: str, labels: Sequence[str] = (), **options: Any) -> Any:
            made.append(kind(f"{prefix}_{name}", about, labels, registry=registry, **options))
            return made[-1]

        counter, gauge, histogram = prometheus.Counter, prometheus.Gauge, prometheus.Histogram
        try:
            return cls(
                requests=add(counter, "requests", "Requests by outcome", ["outcome"]),
                waiting=add(gauge, "requests_waiting", "Requests in the queue"),
                running=add(gauge, "requests_running", "Requests in a row"),
                tokens=add(counter, "tokens", "Tokens by kind", ["kind"]),
                steps=add(histogram, "step_seconds", "Time of a step", ["kind"], buckets=_BUCKETS),
                accepted=add(counter, "accepted_length", "Steps of a request by tokens that they emitted", ["tokens"]),
                queue=add(histogram, "queue_seconds", "Time in the queue", buckets=_BUCKETS),
                first=add(histogram, "first_token_seconds", "Time to the first token", buckets=_BUCKETS),
            )
        except ValueError:
            for collector in made:
                registry.unregister(collector)
            raise


# Collectors by registry and prefix, so that several services in one process can share them.
_shared: WeakKeyDictionary[Any, dict[str, _Collectors]] = WeakKeyDictionary()
_sharing = threading.Lock()


class PrometheusMetrics(Metrics):
    """Counters, gauges and histograms of ``prometheus_client``.

    Each service needs an object of its own. Objects with the same registry and prefix count together: the page shows
    the sum of their services. Different prefixes or registries keep services apart.

    Args:
        registry: The registry; the library's default registry if None.
        prefix: The first part of all names.

    Raises:
        MedusaError: The library is not installed, the prefix is not a valid name, or the names are in use already.
    """

    def __init__(self, registry: Any = None, prefix: str = "medusa") -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MedusaError(
                "prometheus_client is not installed. Install it with: pip install 'medusa-export[prometheus]'."
            ) from error
        registry = prometheus.REGISTRY if registry is None else registry
        with _sharing:
            shared = _shared.setdefault(registry, {})
            try:
                shared[prefix] = _Collectors.registered(prometheus, registry, prefix)
            except ValueError as error:
                if prefix not in shared:
                    raise MedusaError(
                        f"The metrics {prefix}_… can't be registered: {error}. Choose another prefix or registry."
                    ) from error
            self._collectors = shared[prefix]
        self._load = (0, 0)  # the figures that this object has added to the gauges

    @classmethod
    def in_own_registry(cls) -> tuple[Self, Any]:
        """Makes metrics in a new registry; returns the metrics and the registry."""
        try:
            from prometheus_client import CollectorRegistry
        except ImportError:
            return cls(), None  # the constructor raises, with the remedy
        registry = CollectorRegistry()
        return cls(registry), registry

    def rejected(self) -> None:
        self._collectors.requests.labels("rejected").inc()

    def load(self, waiting: int, running: int) -> None:
        self._collectors.waiting.inc(waiting - self._load[0])
        self._collectors.running.inc(running - self._load[1])
        self._load = (waiting, running)

    def step(self, kind: str, rows: int, size: int, tokens: int, seconds: float) -> None:
        self._collectors.steps.labels(kind).observe(seconds)
        if kind == "prefill":
            self._collectors.tokens.labels("prompt").inc(tokens)

    def ended(self, outcome: str, stats: Stats) -> None:
        collectors = self._collectors
        collectors.requests.labels(outcome).inc()
        if stats.cached_tokens:
            collectors.tokens.labels("cached").inc(stats.cached_tokens)
        for length, times in stats.accepted_lengths.items():
            collectors.accepted.labels(str(length)).inc(times)
        collectors.tokens.labels("completion").inc(stats.completion_tokens)  # not the tokens behind its end
        if stats.completion_tokens:
            collectors.queue.observe(stats.queue_seconds)
            collectors.first.observe(stats.queue_seconds + stats.prefill_seconds)

"""What a service tells about itself while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Self

from medusa_runtime.errors import MedusaError
from medusa_runtime.request import Stats

# Seconds; from the step of a small model to the answer of a large one.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


_log = logging.getLogger(__name__)


class Metrics:
    """Hooks that do nothing: derive from it and override what you want to count.

    All are called in the service's own thread but ``rejected``, which whoever submits calls. They should return at
    once. What they raise is logged and goes no further.
    """

    def rejected(self) -> None:
        """The queue was full."""

    def load(self, waiting: int, running: int) -> None:
        """How many wait and run, before each step."""

    def step(self, kind: str, rows: int, size: int, tokens: int, seconds: float) -> None:
        """A step has ended.

        Args:
            kind: ``prefill`` or ``decode``.
            rows: Rows that took part.
            size: Tokens per row.
            tokens: Prompt tokens taken in, or tokens emitted.
            seconds: How long it took.
        """

    def ended(self, outcome: str, stats: Stats) -> None:
        """A request has ended; ``outcome`` is its finish reason, or the name of the error's class."""


def tell(hook: Callable[..., None], *figures: object) -> None:
    """Calls a hook of ``Metrics``; what it raises is logged."""
    try:
        hook(*figures)
    except Exception:  # noqa: BLE001  # a stranger's code
        _log.exception("A hook for metrics failed")


class PrometheusMetrics(Metrics):
    """Counters, gauges and histograms of ``prometheus_client``.

    Args:
        registry: Where they are registered; the library's default one if None.
        prefix: What their names begin with.

    Raises:
        MedusaError: The library is not installed.
    """

    def __init__(self, registry: Any = None, prefix: str = "medusa") -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MedusaError(
                "prometheus_client is not installed. Install it with: pip install 'medusa-export[prometheus]'."
            ) from error
        place: dict[str, Any] = {"registry": prometheus.REGISTRY if registry is None else registry}
        timed = {**place, "buckets": _BUCKETS}
        self._requests = prometheus.Counter(f"{prefix}_requests", "Requests by outcome", ["outcome"], **place)
        self._waiting = prometheus.Gauge(f"{prefix}_requests_waiting", "Requests in the queue", **place)
        self._running = prometheus.Gauge(f"{prefix}_requests_running", "Requests in a row", **place)
        self._tokens = prometheus.Counter(f"{prefix}_tokens", "Tokens by kind", ["kind"], **place)
        self._steps = prometheus.Histogram(f"{prefix}_step_seconds", "Time of a step", ["kind"], **timed)
        self._accepted = prometheus.Counter(
            f"{prefix}_accepted_length", "Steps of a request by tokens that they emitted", ["tokens"], **place
        )
        self._queue = prometheus.Histogram(f"{prefix}_queue_seconds", "Time in the queue", **timed)
        self._first = prometheus.Histogram(f"{prefix}_first_token_seconds", "Time to the first token", **timed)

    @classmethod
    def in_own_registry(cls) -> tuple[Self, Any]:
        """Metrics and the registry that holds nothing but them."""
        try:
            from prometheus_client import CollectorRegistry
        except ImportError:
            return cls(), None  # raises, and says what to do
        registry = CollectorRegistry()
        return cls(registry), registry

    def rejected(self) -> None:
        self._requests.labels("rejected").inc()

    def load(self, waiting: int, running: int) -> None:
        self._waiting.set(waiting)
        self._running.set(running)

    def step(self, kind: str, rows: int, size: int, tokens: int, seconds: float) -> None:
        self._steps.labels(kind).observe(seconds)
        if kind == "prefill":
            self._tokens.labels("prompt").inc(tokens)

    def ended(self, outcome: str, stats: Stats) -> None:
        self._requests.labels(outcome).inc()
        if stats.cached_tokens:
            self._tokens.labels("cached").inc(stats.cached_tokens)
        for length, times in stats.accepted_lengths.items():
            self._accepted.labels(str(length)).inc(times)
        self._tokens.labels("completion").inc(stats.completion_tokens)  # not all that steps emitted are kept
        if stats.completion_tokens:
            self._queue.observe(stats.queue_seconds)
            self._first.observe(stats.queue_seconds + stats.prefill_seconds)

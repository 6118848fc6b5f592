"""Metrics for Prometheus. Those that mean the same as vLLM's have its names, so that its dashboards show them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client import Counter as Total

from medusa_runtime.metrics import Metrics
from medusa_runtime.request import Stats
from medusa_runtime.server.generation import accepted_drafts, drafted

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_LABEL = ("model_name",)
# Seconds between two looks at the event loop.
_LAG_EVERY = 0.05


class ServerMetrics(Metrics):
    """Counts requests, tokens, drafts and times.

    Args:
        model: Name of the model, the label of all metrics.

    Attributes:
        registry: The registry of the metrics.
        accepted_lengths: Steps by the number of tokens that they emitted.
        generated: Tokens that were generated.
        load_figures: Numbers of requests that wait and run, before the last step. Those of the service itself need its
            lock, for which the event loop must not wait.
        worst_lag: Longest time in seconds that the event loop was late.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.accepted_lengths: Counter[int] = Counter()
        self.generated = 0
        self.load_figures = (0, 0)
        self.worst_lag = 0.0
        self._model = model
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests in the queue.")
        self._running = self._gauge("vllm:num_requests_running", "Requests in a row.")
        self._prompt = self._total("vllm:prompt_tokens", "Tokens of prompts.")
        self._cached = self._total("vllm:prefix_cache_hits", "Tokens of prompts that were in a cache.")
        self._queried = self._total("vllm:prefix_cache_queries", "Tokens of prompts that were looked for in caches.")
        self._generation = self._total("vllm:generation_tokens", "Tokens that were generated.")
        self._success = Total(
            "vllm:request_success",
            "Requests that were answered.",
            (*_LABEL, "finished_reason"),
            registry=self.registry,
        )
        self._errors = Total(
            "medusa:request_errors", "Requests that ended with an error.", (*_LABEL, "error"), registry=self.registry
        )
        self._drafts = self._total("vllm:spec_decode_num_drafts", "Steps that verified a draft.")
        self._draft_tokens = self._total("vllm:spec_decode_num_draft_tokens", "Drafted tokens.")
        self._accepted = self._total("vllm:spec_decode_num_accepted_tokens", "Accepted drafted tokens.")
        self._accepted_by_depth = Total(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafted tokens by depth.",
            (*_LABEL, "position"),
            registry=self.registry,
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Time to the first token.")
        self._per_token = self._histogram("vllm:time_per_output_token_seconds", "Time per further token.")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Time to the last token.")
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Time in the queue.")
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Time of prefill.")
        self._decode = self._histogram("vllm:request_decode_time_seconds", "Time of decoding.")
        self._prompt_sizes = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._sizes = self._histogram("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._steps = Histogram(
            "medusa:step_seconds", "Time of a step.", (*_LABEL, "kind"), buckets=_SECONDS, registry=self.registry
        )
        self._lag = self._histogram("medusa:event_loop_lag_seconds", "Time that the event loop was late.")

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(name, about, _LABEL, registry=self.registry).labels(self._model)

    def _total(self, name: str, about: str) -> Total:
        return Total(name, about, _LABEL, registry=self.registry).labels(self._model)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, about, _LABEL, buckets=buckets, registry=self.registry).labels(self._model)

    def rejected(self) -> None:
        self._errors.labels(self._model, "QueueFullError").inc()

    def load(self, waiting: int, running: int) -> None:
        self.load_figures = (waiting, running)
        self._waiting.set(waiting)
        self._running.set(running)

    def step(self, kind: str, rows: int, size: int, tokens: int, seconds: float) -> None:
        self._steps.labels(self._model, kind).observe(seconds)
        if kind == "decode":
            self.generated += tokens

    def ended(self, outcome: str, stats: Stats) -> None:
        if outcome in ("stop", "length"):
            self._success.labels(self._model, outcome).inc()
        else:
            self._errors.labels(self._model, outcome).inc()
        self._prompt.inc(stats.prompt_tokens)
        self._queried.inc(stats.prompt_tokens)
        self._cached.inc(stats.cached_tokens)
        self._generation.inc(stats.completion_tokens)
        self._drafts.inc(sum(times for size, times in stats.tree_sizes.items() if size > 1))
        self._draft_tokens.inc(drafted(stats))
        self._accepted.inc(accepted_drafts(stats))
        for length, times in stats.accepted_lengths.items():
            self.accepted_lengths[length] += times
            for depth in range(length - 1):
                self._accepted_by_depth.labels(self._model, str(depth)).inc(times)
        if stats.completion_tokens:
            first = stats.queue_seconds + stats.prefill_seconds
            self._queue.observe(stats.queue_seconds)
            self._prefill.observe(stats.prefill_seconds)
            self._decode.observe(stats.decode_seconds)
            self._first.observe(first)
            self._whole.observe(first + stats.decode_seconds)
            self._prompt_sizes.observe(stats.prompt_tokens)
            self._sizes.observe(stats.completion_tokens)
        if stats.completion_tokens > 1:
            self._per_token.observe(stats.decode_seconds / (stats.completion_tokens - 1))

    async def watch_loop(self) -> None:
        """Measures how late the event loop is, until the task is cancelled."""
        while True:
            started = time.monotonic()
            await asyncio.sleep(_LAG_EVERY)
            late = max(0.0, time.monotonic() - started - _LAG_EVERY)
            self._lag.observe(late)
            self.worst_lag = max(self.worst_lag, late)

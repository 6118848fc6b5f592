"""Hands the server's metrics on to Ray, which exports them with the names of application, deployment and replica."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample
from ray.serve.metrics import Gauge

# Ray exports its metrics every ten seconds.
_EVERY = 5.0


class RayMetrics:
    """Copies of all figures of a registry in gauges of Ray.

    A gauge can hold a counter's figure, and one of a bucket. Queries need the figures alone. Ray allows no colons in
    names and adds a prefix: ``vllm:num_requests_running`` becomes ``ray_vllm_num_requests_running``.

    Args:
        registry: The registry.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}

    async def report_loop(self) -> None:
        """Copies the figures every few seconds, until the task is cancelled."""
        while True:
            for sample in self._samples():
                self._gauge(sample).set(sample.value, tags=dict(sample.labels))
            await asyncio.sleep(_EVERY)

    def _samples(self) -> Iterator[Sample]:
        for family in self._registry.collect():
            yield from (sample for sample in family.samples if not sample.name.endswith("_created"))

    def _gauge(self, sample: Sample) -> Gauge:
        name = sample.name.replace(":", "_")
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description=sample.name, tag_keys=tuple(sample.labels))
        return self._gauges[name]

"""The status page: load, speed and acceptance by depth, drawn in the browser from figures that it asks for."""

from __future__ import annotations

import time
from importlib.resources import files

from typing_extensions import TypedDict

from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.service import MedusaService

PAGE = "status.html"


class Figures(TypedDict):
    """The figures of the status page.

    ``acceptance`` is the share of steps that accepted a draft of at least this depth, from depth 1.
    """

    model: str
    state: str
    waiting: int
    running: int
    time: float
    generated: int
    acceptance: list[float]
    event_loop_lag: float


def figures(service: MedusaService, metrics: ServerMetrics, model: str) -> Figures:
    """The figures now."""
    lengths = dict(metrics.accepted_lengths)
    steps = sum(lengths.values())
    deepest = max(lengths, default=1)
    waiting, running = metrics.load_figures
    return {
        "model": model,
        "state": service.state,
        "waiting": waiting,
        "running": running,
        "time": time.monotonic(),
        "generated": metrics.generated,
        "acceptance": [
            sum(times for length, times in lengths.items() if length > depth) / steps for depth in range(1, deepest)
        ],
        "event_loop_lag": metrics.worst_lag,
    }


def page() -> str:
    """The page's HTML."""
    return (files("medusa_runtime.server") / PAGE).read_text(encoding="utf-8")

"""A long stormy day of a service: random requests, cancels, deadlines and consumers over a few rows of a tiny model.

Every request must end exactly once; every finished one must equal its run alone, chunk by chunk; afterwards nothing
may run or wait. Fails with exit code 1 otherwise. Memory is reported as the slope of RSS over the second half of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from decoding import export, guessing_heads, make_step
from medusa_runtime import (
    Chunk,
    MedusaEngine,
    MedusaError,
    MedusaService,
    Metrics,
    QueueFullError,
    RequestHandle,
    Stats,
)
from tiny_models import tiny_model


@dataclass
class Request:
    """A request, what is going to happen to it, and what came of it.

    Attributes:
        prompt: Its tokens.
        max_new_tokens: Of its answer.
        consumer: ``read``, ``callback``, or ``raise`` for a callback that fails.
        cancel_after: Chunks after which a reader cancels it.
        timeout: Seconds until its deadline.
        received: Tokens that came in chunks.
        outcome: How it ended, or ``lost``.
    """

    prompt: list[int]
    max_new_tokens: int
    consumer: str
    cancel_after: int | None
    timeout: float | None
    received: list[int] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    outcome: str = "lost"

    def callback(self, chunk: Chunk) -> None:
        """Takes a chunk, or raises."""
        self.received += chunk.token_ids
        if self.consumer == "raise":
            raise RuntimeError("a consumer's fault")

    def follow(self, handle: RequestHandle) -> None:
        """Reads a handle to its end."""
        try:
            if self.consumer == "read":
                for count, chunk in enumerate(handle):
                    self.received += chunk.token_ids
                    if count == self.cancel_after:
                        handle.cancel()
            result = handle.result(120)
            self.tokens, self.outcome = result.token_ids, result.finish_reason
        except MedusaError as error:
            self.outcome = type(error).__name__


class Ends(Metrics):
    """Counts how requests end."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def ended(self, outcome: str, stats: Stats) -> None:
        self.count[outcome] += 1


def draw(rng: np.random.Generator, systems: list[list[int]]) -> Request:
    """A random request; half of them begin with one of a few system prompts."""
    prompt = rng.integers(1, 101, int(rng.exponential(25)) + 1).tolist()
    if rng.random() < 0.5:
        prompt = systems[int(rng.integers(len(systems)))] + prompt
    return Request(
        prompt[:300],
        int(rng.integers(1, 80)),
        str(rng.choice(["read", "callback", "raise"], p=[0.75, 0.2, 0.05])),
        int(rng.integers(20)) if rng.random() < 0.15 else None,
        float(rng.exponential(0.5)) + 1e-3 if rng.random() < 0.15 else None,
    )


def submit(service: MedusaService, request: Request) -> RequestHandle:
    """Submits a request, and again while the queue is full."""
    while True:
        try:
            return service.submit(
                request.prompt,
                max_new_tokens=request.max_new_tokens,
                timeout=request.timeout,
                priority=len(request.prompt) % 3,
                on_chunk=None if request.consumer == "read" else request.callback,
            )
        except QueueFullError:
            time.sleep(0.02)


@click.command()
@click.option("--requests", default=1000, show_default=True)
@click.option("--rows", default=8, show_default=True)
@click.option("--rate", default=60.0, show_default=True, help="Mean arrivals per second.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here.")
def main(requests: int, rows: int, rate: float, seed: int, json_path: Path | None) -> None:
    """Runs the day and prints its report."""
    rng = np.random.default_rng(seed)
    systems = [rng.integers(1, 101, 60).tolist() for _ in range(3)]
    day = [draw(rng, systems) for _ in range(requests)]
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model("llama")
        bundle = export(make_step(model, guessing_heads(model)), Path(folder) / "bundle", trained=True)
        report = weather(bundle.folder, day, rows, rng.exponential(1 / rate, requests))
        engine = MedusaEngine.load(bundle.folder, threads=1)
        report["wrong"] = sum(is_wrong(request, engine) for request in day)
    click.echo(json.dumps(report, indent=1))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if report["wrong"] or report["lost"] or report["ended"] != requests or not report["drained"]:
        sys.exit(1)


def weather(folder: Path, day: list[Request], rows: int, pauses: np.ndarray) -> dict[str, Any]:
    """Sends all requests through a service; gives the figures."""
    ends, process, memory = Ends(), psutil.Process(), []
    service = MedusaService.load(folder, rows=rows, threads=1, max_queue=16, prefill_chunk=16, metrics=ends)
    started, threads = time.monotonic(), []
    for number, (request, pause) in enumerate(zip(day, pauses, strict=True)):
        time.sleep(pause)
        threads.append(threading.Thread(target=request.follow, args=(submit(service, request),)))
        threads[-1].start()
        memory.append((number, process.memory_info().rss))
    drained = service.drain(120)
    for thread in threads:
        thread.join(120)
    seconds = time.monotonic() - started
    waiting, running = service.load_figures
    service.close()
    second_half = np.array(memory[len(memory) // 2 :], dtype=float)
    return {
        "requests": len(day),
        "rows": rows,
        "seconds": round(seconds, 1),
        "tokens": sum(len(request.received) for request in day),
        "outcomes": dict(Counter(request.outcome for request in day)),
        "ended": sum(ends.count.values()),
        "lost": sum(request.outcome == "lost" for request in day),
        "drained": drained and waiting == running == 0,
        "threads_left": [thread.name for thread in threading.enumerate()],
        "rss_mib": [round(rss / 2**20, 1) for _, rss in memory[:: max(len(memory) // 8, 1)]],
        "rss_slope_bytes_per_request": round(float(np.polyfit(second_half[:, 0], second_half[:, 1], 1)[0])),
    }


def is_wrong(request: Request, engine: MedusaEngine) -> bool:
    """Whether an answer is not what the request gets alone; of one that was cut short, what came of it."""
    alone = engine.generate(request.prompt, max_new_tokens=request.max_new_tokens, tree_size=1).token_ids
    received = tuple(request.received)
    if request.outcome in ("stop", "length"):
        behind = request.consumer != "read"  # a callback's own thread may end later than the request
        return request.tokens != alone or (received != alone if not behind else received != alone[: len(received)])
    return received != alone[: len(received)]


if __name__ == "__main__":
    main()

"""What a long prompt costs streams that are running, and what they cost it, by the size of its chunks.

Three requests decode; then one with a long prompt arrives, and answers with a few tokens. The pauses of running streams
are set against the time until the first token of the long one.
"""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from medusa_runtime import Bundle, MedusaService, Metrics, RequestCancelledError, RequestHandle
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

STREAMS = 3
ANSWER = 12  # tokens


def read(handle: RequestHandle, times: list[float]) -> None:
    """Notes when chunks come, until the request is cancelled."""
    with suppress(RequestCancelledError):
        times.extend(time.perf_counter() for _ in handle)


class Chunks(Metrics):
    """Notes how long chunks of prompts take."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def step(self, kind: str, rows: int, size: int, tokens: int, seconds: float) -> None:
        if kind == "prefill":
            self.seconds.append(seconds)


@dataclass(frozen=True)
class Arrival:
    """What came of one arrival; seconds.

    Attributes:
        usual: Median pause of a stream before the long prompt comes.
        chunk: What a chunk takes, median.
        pause: Pause of a stream while the long prompt is taken in, median.
        longest: The longest of these.
        longest_chunk: The longest chunk.
        joining: The longest pause of a stream after that, while the long one decodes, too.
        first_token: Until the first token of the long one.
    """

    usual: float
    chunk: float
    pause: float
    longest: float
    longest_chunk: float
    joining: float
    first_token: float


def arrival(service: MedusaService, chunks: Chunks, length: int, offset: int) -> Arrival:
    """Lets streams run, and then a long prompt come."""
    times: list[list[float]] = [[] for _ in range(STREAMS)]
    handles = [service.submit(range(10 + offset + i, 40 + offset + i), max_new_tokens=600) for i in range(STREAMS)]
    threads = [threading.Thread(target=read, args=pair) for pair in zip(handles, times, strict=True)]
    for thread in threads:
        thread.start()
    while min(map(len, times)) < 10:
        time.sleep(0.01)
    chunks.seconds.clear()
    started = time.perf_counter()
    long = service.submit([(7 * i + offset) % 1000 + 50 for i in range(length)], max_new_tokens=ANSWER)
    next(long)
    first_token = time.perf_counter()
    long.result()
    ended = time.perf_counter()
    for handle, thread in zip(handles, threads, strict=True):
        handle.cancel()
        thread.join()
    pauses = [(b, b - a) for stream in times for a, b in pairwise(stream)]
    during = [pause for at, pause in pauses if started <= at <= first_token]
    return Arrival(
        usual=statistics.median(pause for at, pause in pauses if at < started),
        chunk=statistics.median(chunks.seconds),
        pause=statistics.median(during),
        longest=max(during),
        longest_chunk=max(chunks.seconds),
        joining=max(pause for at, pause in pauses if first_token < at <= ended),
        first_token=first_token - started,
    )


@click.command()
@click.argument("folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--length", default=2000, show_default=True, help="Tokens of the long prompt.")
@click.option("--chunk", "chunks", multiple=True, type=int, default=(16, 32, 64, 128), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(folder: Path, length: int, chunks: tuple[int, ...], rounds: int, threads: int) -> None:
    """Prints a table of medians over rounds."""
    bundle, chunk_times = Bundle.load(folder, check_digests=False), Chunks()
    backend = OnnxRuntimeBackend(bundle, rows=STREAMS + 1, threads=threads)
    service = MedusaService(bundle, backend, None, tree_size=1, metrics=chunk_times)
    arrivals: dict[int, list[Arrival]] = {chunk: [] for chunk in chunks}
    arrival(service, chunk_times, length, 0)  # warms up
    for turn in range(rounds):
        for place, chunk in enumerate(chunks):
            service._thread.turns.prefill_chunk = chunk  # one session for all, for it holds a copy of the weights
            arrivals[chunk].append(arrival(service, chunk_times, length, 7 * (turn * len(chunks) + place + 1)))
    service.close()
    names = [field.name for field in fields(Arrival)]
    table = Table("tokens per chunk", *(f"{name.replace('_', ' ')}, ms" for name in names), box=box.SIMPLE_HEAD)
    for chunk, figures in arrivals.items():
        medians = [statistics.median(getattr(figure, name) for figure in figures) for name in names]
        table.add_row(str(chunk), *(f"{1e3 * median:.0f}" for median in medians))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

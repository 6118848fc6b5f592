"""Measures, by chunk size, how a long prompt delays running streams, and how these delay the long prompt.

Three requests decode. Then a request with a long prompt arrives, and answers with a few tokens. The table shows the
pauses of the running streams, and the time until the first token of the long request.
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
ANSWER = 12  # tokens of the long request's answer


def read(handle: RequestHandle, times: list[float]) -> None:
    """Records the times of a request's chunks, until the request is cancelled."""
    with suppress(RequestCancelledError):
        times.extend(time.perf_counter() for _ in handle)


class Chunks(Metrics):
    """Records how long chunks of prompts take, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def step(self, kind: str, rows: int, size: int, tokens: int, seconds: float) -> None:
        if kind == "prefill":
            self.seconds.append(seconds)


@dataclass(frozen=True)
class Arrival:
    """Times around the arrival of one long prompt, in seconds.

    Attributes:
        usual: Median pause of a stream before the long prompt arrives.
        chunk: Median time of a chunk.
        pause: Median pause of a stream during the prefill of the long prompt.
        longest: Longest pause of a stream during that prefill.
        longest_chunk: Longest time of a chunk.
        joining: Longest pause of a stream after the prefill, while the long request decodes.
        first_token: Time from arrival to the first token of the long request.
    """

    usual: float
    chunk: float
    pause: float
    longest: float
    longest_chunk: float
    joining: float
    first_token: float


def arrival(service: MedusaService, chunks: Chunks, length: int, offset: int) -> Arrival:
    """Starts the streams, then submits a long prompt, and measures both.

    Args:
        service: The service.
        chunks: The service's metrics.
        length: Tokens of the long prompt.
        offset: Shifts the token ids, so that no prefix of an earlier prompt is reused.
    """
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
@click.option(
    "--chunk", "chunks", multiple=True, type=int, default=(16, 32, 64, 128), show_default=True, help="Tokens per chunk."
)
@click.option("--rounds", default=3, show_default=True, help="Number of rounds.")
@click.option("--threads", default=2, show_default=True, help="Threads of the service.")
def main(folder: Path, length: int, chunks: tuple[int, ...], rounds: int, threads: int) -> None:
    """Prints a table of median times over rounds, by chunk size."""
    bundle, chunk_times = Bundle.load(folder, check_digests=False), Chunks()
    backend = OnnxRuntimeBackend(bundle, rows=STREAMS + 1, threads=threads)
    service = MedusaService(bundle, backend, None, tree_size=1, metrics=chunk_times)
    arrivals: dict[int, list[Arrival]] = {chunk: [] for chunk in chunks}
    arrival(service, chunk_times, length, 0)  # warms up
    for turn in range(rounds):
        for place, chunk in enumerate(chunks):
            service._thread.loop.prefill_chunk = chunk  # not a new service, which would load the weights again
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

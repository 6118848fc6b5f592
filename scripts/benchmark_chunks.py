"""What a long prompt costs streams that are running, and what they cost it, by the size of its chunks.

Three requests decode; then one with a long prompt arrives. The longest pause between two chunks of a running stream is
set against the time until the first token of the long one.
"""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from medusa_runtime import Bundle, MedusaService, RequestCancelledError, RequestHandle
from medusa_runtime.backends.onnxruntime_batch import OnnxRuntimeBatchBackend

STREAMS = 3


def read(handle: RequestHandle, times: list[float]) -> None:
    """Notes when chunks come, until the request is cancelled."""
    with suppress(RequestCancelledError):
        times.extend(time.perf_counter() for _ in handle)


def arrival(service: MedusaService, length: int, offset: int) -> tuple[float, float, float]:
    """Median pause before the long prompt comes, longest one while it prefills, and its time to the first token."""
    times: list[list[float]] = [[] for _ in range(STREAMS)]
    handles = [service.submit(range(10 + offset + i, 40 + offset + i), max_new_tokens=400) for i in range(STREAMS)]
    threads = [threading.Thread(target=read, args=pair) for pair in zip(handles, times, strict=True)]
    for thread in threads:
        thread.start()
    while min(map(len, times)) < 10:
        time.sleep(0.01)
    started = time.perf_counter()
    service.generate([(7 * i + offset) % 1000 + 50 for i in range(length)], max_new_tokens=1)
    ended = time.perf_counter()
    for handle, thread in zip(handles, threads, strict=True):
        handle.cancel()
        thread.join()
    pauses = [(b, b - a) for stream in times for a, b in pairwise(stream)]
    before = [pause for at, pause in pauses if at < started]
    during = [pause for at, pause in pauses if started <= at <= ended]
    return statistics.median(before), max(during, default=0.0), ended - started


@click.command()
@click.argument("folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--length", default=1000, show_default=True, help="Tokens of the long prompt.")
@click.option("--chunk", "chunks", multiple=True, type=int, default=(16, 32, 64, 128, 256), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(folder: Path, length: int, chunks: tuple[int, ...], rounds: int, threads: int) -> None:
    """Prints a table of medians over rounds."""
    bundle = Bundle.load(folder, check_digests=False)
    backend = OnnxRuntimeBatchBackend(bundle, rows=STREAMS + 1, threads=threads)
    service = MedusaService(bundle, backend, None, tree_size=1)
    figures: dict[int, list[tuple[float, float, float]]] = {chunk: [] for chunk in chunks}
    for turn in range(rounds):
        for place, chunk in enumerate(chunks):
            service._prefill_chunk = chunk  # one session for all, for it holds a copy of the weights
            figures[chunk].append(arrival(service, length, 7 * (turn * len(chunks) + place)))
    service.close()
    table = Table("chunk", "usual pause", "longest pause", "first token of the long one", box=box.SIMPLE_HEAD)
    for chunk, rows in figures.items():
        table.add_row(str(chunk), *(f"{1e3 * statistics.median(column):.0f} ms" for column in zip(*rows, strict=True)))
    Console().print(table)


if __name__ == "__main__":
    main()

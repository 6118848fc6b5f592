"""Aggregate speed of a service at several requests at a time, against the same requests one after another.

Contestants take turns; each round everyone answers the same prompts with the same number of tokens. Time is from
the first submission to the last token, prefill included. The first round warms up.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from medusa_export.benchmarks.bench import bench_prompts
from medusa_runtime import Bundle, MedusaEngine, MedusaService
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.text.tokenizer import Tokenizer

Tokens = list[tuple[int, ...]]
Contestant = Callable[[list[list[int]], int], Tokens]


def one_after_another(engine: MedusaEngine, tree_size: int) -> Contestant:
    """An engine at one tree size."""
    return lambda prompts, count: [
        engine.generate(prompt, max_new_tokens=count, tree_size=tree_size).token_ids for prompt in prompts
    ]


def at_a_time(service: MedusaService) -> Contestant:
    """A service."""

    def run(prompts: list[list[int]], count: int) -> Tokens:
        handles = [service.submit(prompt, max_new_tokens=count) for prompt in prompts]
        return [handle.result().token_ids for handle in handles]

    return run


def interval(ratios: list[float]) -> tuple[float, float]:
    """Where the mean of a ratio lies with a confidence of 90 %, by the spread of its logarithm over rounds."""
    logs = [math.log(ratio) for ratio in ratios]
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    middle = statistics.fmean(logs)
    return math.exp(middle - 1.645 * error), math.exp(middle + 1.645 * error)


@click.command()
@click.argument("folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--requests", default=4, show_default=True, help="Requests at a time, and rows.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", type=float, help="Begin no round after so many, however many are left.")
@click.option("--tokens", default=96, show_default=True, help="Tokens of each answer, at most.")
@click.option("--engine-size", "engine_sizes", multiple=True, type=int, default=(1, 4, 6), show_default=True)
@click.option("--service-size", "service_sizes", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--no-engine", is_flag=True, help="Compare the service's tree sizes only.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
def main(
    folder: Path,
    requests: int,
    threads: int,
    rounds: int,
    seconds: float | None,
    tokens: int,
    engine_sizes: tuple[int, ...],
    service_sizes: tuple[int, ...],
    no_engine: bool,
    json_path: Path | None,
) -> None:
    """Prints a table of medians; 'auto' is the service as it comes."""
    bundle = Bundle.load(folder, check_digests=False)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    prompts = [tokenizer.encode_chat([{"role": "user", "content": prompt.prompt}]) for prompt in bench_prompts()]
    service = MedusaService(bundle, OnnxRuntimeBackend(bundle, rows=requests, threads=threads), tokenizer)
    runner = service._thread.runner  # one session for all tree sizes, for it holds a copy of the weights
    contestants: dict[str, Contestant] = {}
    if not no_engine:
        engine = MedusaEngine.load(folder, threads=threads, check_digests=False)
        contestants = {f"one after another, tree size {size}": one_after_another(engine, size) for size in engine_sizes}
    alone = list(contestants)

    def with_size(size: int | str) -> Contestant:
        def run(group: list[list[int]], count: int) -> Tokens:
            runner._tree_size = size  # nothing is running
            return at_a_time(service)(group, count)

        return run

    for size in ("auto", *service_sizes):
        contestants[f"{requests} at a time, tree size {size}"] = with_size(size)
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    same = dict.fromkeys(contestants, True)
    begun = time.monotonic()
    orders = random.Random(0)  # noqa: S311  # no secret
    for turn in range(rounds + 1):
        if turn > 2 and seconds is not None and time.monotonic() - begun > seconds:
            break
        first = turn * requests % len(prompts)
        group = (prompts + prompts)[first : first + requests]
        answers = {}
        for name in orders.sample(list(contestants), len(contestants)):
            started = time.perf_counter()
            answers[name] = contestants[name](group, tokens)
            taken = time.perf_counter() - started
            if turn:
                speeds[name].append(sum(map(len, answers[name])) / taken)
        for name in contestants:
            same[name] &= answers[name] == answers[next(iter(contestants))]
    plain = f"{requests} at a time, tree size 1"
    baselines = [plain] if plain in contestants else []
    if alone:
        baselines.append(max(alone, key=lambda name: statistics.median(speeds[name])))
    table = Table("", "tokens/s", *(f"against\n{name}" for name in baselines), "same tokens", box=box.SIMPLE_HEAD)
    for name, values in speeds.items():
        cells = []
        for baseline in baselines:
            ratios = [ours / theirs for ours, theirs in zip(values, speeds[baseline], strict=True)]
            low, high = interval(ratios)
            cells.append("1" if name == baseline else f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")
        table.add_row(name, f"{statistics.median(values):.1f}", *cells, "yes" if same[name] else "NO")
    Console(width=140).print(table)
    sizes = runner.choice.sizes
    accuracy = [runner.choice.accuracy(guessed=guessed) for guessed in (False, True)]
    Console().print(
        f"Tree sizes that auto takes, by rows, without a guess from the text and with one: {sizes}; right tokens: "
        f"{accuracy[0]:.2f} and {accuracy[1]:.2f} of those expected."
    )
    service.close()
    if json_path is not None:
        figures = {"speeds": speeds, "same": same, "auto": sizes, "accuracy": accuracy}
        json_path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Compares the speed of a service with several requests at a time and of an engine with one request after another.

In each round every contestant answers the same prompts with the same number of tokens. The time runs from the first
submission to the last token, prefill included. The first round warms up.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from medusa_export.benchmarks.prompts import bench_prompts
from medusa_runtime import Bundle, MedusaEngine, MedusaService
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.text.tokenizer import Tokenizer

Tokens = list[tuple[int, ...]]
Contestant = Callable[[list[list[int]], int], Tokens]


def one_after_another(engine: MedusaEngine, tree_size: int) -> Contestant:
    """A contestant: an engine at one tree size."""
    return lambda prompts, count: [
        engine.generate(prompt, max_new_tokens=count, tree_size=tree_size).token_ids for prompt in prompts
    ]


def at_a_time(service: MedusaService) -> Contestant:
    """A contestant: a service."""

    def run(prompts: list[list[int]], count: int) -> Tokens:
        handles = [service.submit(prompt, max_new_tokens=count) for prompt in prompts]
        return [handle.result().token_ids for handle in handles]

    return run


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 90 % confidence interval of the mean ratio, from the spread of its logarithm over rounds."""
    logs = [math.log(ratio) for ratio in ratios]
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    middle = statistics.fmean(logs)
    return math.exp(middle - 1.645 * error), math.exp(middle + 1.645 * error)


@dataclass(frozen=True)
class Comparison:
    """The results of all rounds.

    Attributes:
        speeds: Tokens per second of each round, by contestant.
        same: Whether a contestant's tokens equal the first contestant's in all rounds, by contestant.
    """

    speeds: dict[str, list[float]]
    same: dict[str, bool]

    def table(self, baselines: list[str]) -> Table:
        """A table of median speeds, and of their ratios to those of the baselines."""
        columns = (f"against\n{name}" for name in baselines)
        table = Table("", "tokens/s", *columns, "same tokens", box=box.SIMPLE_HEAD)
        for name, values in self.speeds.items():
            cells = []
            for baseline in baselines:
                ratios = [ours / theirs for ours, theirs in zip(values, self.speeds[baseline], strict=True)]
                low, high = interval(ratios)
                cells.append("1" if name == baseline else f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})")
            table.add_row(name, f"{statistics.median(values):.1f}", *cells, "yes" if self.same[name] else "NO")
        return table


def compare(
    contestants: dict[str, Contestant],
    prompts: list[list[int]],
    requests: int,
    tokens: int,
    *,
    rounds: int,
    seconds: float | None,
) -> Comparison:
    """Runs all rounds. The arguments are the options of ``main``."""
    found = Comparison({name: [] for name in contestants}, dict.fromkeys(contestants, True))
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
                found.speeds[name].append(sum(map(len, answers[name])) / taken)
        for name in contestants:
            found.same[name] &= answers[name] == answers[next(iter(contestants))]
    return found


@click.command()
@click.argument("folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--requests", default=4, show_default=True, help="Requests at a time, and rows.")
@click.option("--threads", default=2, show_default=True, help="Threads of each contestant.")
@click.option("--rounds", default=5, show_default=True, help="Number of rounds, after one to warm up.")
@click.option("--seconds", type=float, help="Start no more rounds after this time.")
@click.option("--tokens", default=96, show_default=True, help="The most tokens of an answer.")
@click.option(
    "--engine-size", "engine_sizes", multiple=True, type=int, default=(1, 4, 6), show_default=True,
    help="Tree size of the engine.",
)  # fmt: skip
@click.option(
    "--service-size", "service_sizes", multiple=True, type=int, default=(1, 2), show_default=True,
    help="Tree size of the service, beside auto.",
)  # fmt: skip
@click.option("--no-engine", is_flag=True, help="Compare only the service's tree sizes.")
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
    """Prints a table of median speeds. 'auto' is the service's default tree size."""
    bundle = Bundle.load(folder, check_digests=False)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    prompts = [tokenizer.encode_chat([{"role": "user", "content": prompt.prompt}]) for prompt in bench_prompts()]
    service = MedusaService(bundle, OnnxRuntimeBackend(bundle, rows=requests, threads=threads), tokenizer)
    tree_sizes = service._thread.loop.sizes  # one service for all tree sizes, as each would load the weights again
    contestants: dict[str, Contestant] = {}
    if not no_engine:
        engine = MedusaEngine.load(folder, threads=threads, check_digests=False)
        contestants = {f"one after another, tree size {size}": one_after_another(engine, size) for size in engine_sizes}
    alone = list(contestants)

    def with_size(size: int | str) -> Contestant:
        def run(group: list[list[int]], count: int) -> Tokens:
            tree_sizes.tree_size = size  # safe, as no request is running
            return at_a_time(service)(group, count)

        return run

    for size in ("auto", *service_sizes):
        contestants[f"{requests} at a time, tree size {size}"] = with_size(size)
    found = compare(contestants, prompts, requests, tokens, rounds=rounds, seconds=seconds)
    plain = f"{requests} at a time, tree size 1"
    baselines = [plain] if plain in contestants else []
    if alone:
        baselines.append(max(alone, key=lambda name: statistics.median(found.speeds[name])))
    Console(width=140).print(found.table(baselines))
    sizes = tree_sizes.choice.sizes
    accuracy = [tree_sizes.choice.accuracy(hit=hit) for hit in (False, True)]
    Console().print(
        f"Tree sizes that auto chooses, by number of rows, as (without, with) a lookup hit: {sizes}. Accepted tokens "
        f"relative to the acceptance estimates: {accuracy[0]:.2f} without a lookup hit, {accuracy[1]:.2f} with one."
    )
    service.close()
    if json_path is not None:
        figures = {"speeds": found.speeds, "same": found.same, "auto": sizes, "accuracy": accuracy}
        json_path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Compares the decoding speed of plain steps. In each round every contestant generates the same number of tokens."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from medusa_export.benchmarks.contestants import Contestant as Peer
from medusa_export.benchmarks.peers import genai_contestant, transformers_contestant
from medusa_runtime import MedusaEngine
from medusa_runtime.bundles.bundle import WEIGHTS

PROMPT = "Write a long story about a lighthouse keeper who finds a message in a bottle."
# Generates a number of tokens; returns the seconds from the first token to the last.
Contestant = Callable[[int], float]


class Bundle:
    """A bundle at one tree size. Also measures the host overhead: the share of a step outside the session's run."""

    def __init__(self, folder: Path, prompt: list[int], threads: int, tree_size: int) -> None:
        self.engine = MedusaEngine.load(folder, threads=threads, check_digests=False)
        self.prompt, self.tree_size = prompt, tree_size
        self.in_session: list[float] = []
        self.overheads: list[float] = []
        backend: Any = self.engine.backend
        session = backend._session
        run = session.run_with_iobinding

        def timed(*arguments: Any) -> None:
            started = time.perf_counter()
            run(*arguments)
            self.in_session.append(time.perf_counter() - started)

        session.run_with_iobinding = timed

    def __call__(self, tokens: int) -> float:
        self.in_session.clear()
        result = self.engine.generate(self.prompt, max_new_tokens=tokens, tree_size=self.tree_size)
        seconds, steps = result.stats.decode_seconds, result.stats.steps
        self.overheads.append(1 - sum(self.in_session[-steps:]) / seconds)
        return seconds * (tokens - 1) / (len(result.token_ids) - 1)


def seconds_of(peer: Peer, prompt: list[int]) -> Contestant:
    """Another runtime as a contestant of this script."""

    def run(tokens: int) -> float:
        answer = peer(prompt, tokens)
        return answer.decode_seconds * (tokens - 1) / answer.steps

    return run


def reading(size: int, threads: int) -> Contestant:
    """A contestant that only reads as many bytes as the weights have, once per token. No decoder can be faster."""
    torch.set_num_threads(threads)
    weights = torch.ones(size // 4)

    def run(tokens: int) -> float:
        started = time.perf_counter()
        for _ in range(tokens - 1):
            weights.sum()
        return time.perf_counter() - started

    return run


@click.command()
@click.option("--heads", type=click.Path(path_type=Path), required=True, help="Bundle with heads.")
@click.option("--no-heads", type=click.Path(path_type=Path), required=True, help="Bundle of the same model without.")
@click.option("--genai", "genai_model", type=click.Path(path_type=Path), help="Model folder for onnxruntime-genai.")
@click.option("--model", help="Model for transformers: a folder, a hub id or a GGUF file.")
@click.option("--threads", default=2, show_default=True, help="Threads of each contestant.")
@click.option("--rounds", default=15, show_default=True, help="Number of rounds, after one to warm up.")
@click.option("--tokens", default=48, show_default=True, help="Tokens per contestant and round.")
@click.option("--tree-size", "tree_sizes", multiple=True, type=int, help="Add the bundle with a tree of this size.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all figures here.")
def main(
    heads: Path,
    no_heads: Path,
    genai_model: Path | None,
    model: str | None,
    threads: int,
    rounds: int,
    tokens: int,
    tree_sizes: tuple[int, ...],
    json_path: Path | None,
) -> None:
    """Prints a table of median step times, and of speed ratios within a round."""
    plain_name = "bundle with heads, tree size 1"
    with MedusaEngine.load(heads, check_digests=False) as engine:
        assert engine.tokenizer is not None
        prompt = engine.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    plain = Bundle(heads, prompt, threads, 1)
    contestants: dict[str, Contestant] = {
        plain_name: plain,
        "bundle without heads": Bundle(no_heads, prompt, threads, 1),
    }
    for size in tree_sizes:
        contestants[f"bundle with heads, tree size {size}, per step"] = _per_step(Bundle(heads, prompt, threads, size))
    if genai_model is not None:
        contestants["onnxruntime-genai, fp32"] = seconds_of(genai_contestant(genai_model, threads), prompt)
    if model is not None:
        contestants["transformers generate"] = seconds_of(transformers_contestant(model, threads), prompt)
    contestants["reading the weights"] = reading((no_heads / WEIGHTS).stat().st_size, threads)

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    orders = random.Random(0)  # noqa: S311  # no secret
    for run in range(rounds + 1):
        for name in orders.sample(list(contestants), len(contestants)):  # so that none always follows the same one
            taken = contestants[name](tokens)
            if run > 0:  # the first round warms up
                seconds[name].append(taken / (tokens - 1))

    table = Table("", "ms/step", "best", "tokens/s", f"speed against\n{plain_name}", box=box.SIMPLE_HEAD)
    report = {"threads": threads, "rounds": rounds, "tokens": tokens, "host_overhead": _median(plain.overheads[1:])}
    report["contestants"] = {}
    for name, taken in seconds.items():
        ratio = _median([ours / theirs for ours, theirs in zip(seconds[plain_name], taken, strict=True)])
        table.add_row(
            name, f"{_median(taken) * 1e3:.2f}", f"{min(taken) * 1e3:.2f}", f"{1 / _median(taken):.1f}", f"{ratio:.3f}"
        )
        report["contestants"][name] = {"seconds_per_step": taken, "speed_ratio": ratio}
    console = Console()
    console.print(table)
    console.print(f"Host overhead at tree size 1: {report['host_overhead']:.2%} of a step.")
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _per_step(bundle: Bundle) -> Contestant:
    """A contestant that takes ``tokens - 1`` steps. Steps of a tree emit more than one token, so steps are counted."""

    def run(tokens: int) -> float:
        result = bundle.engine.generate(bundle.prompt, max_new_tokens=tokens, tree_size=bundle.tree_size)
        return result.stats.decode_seconds / result.stats.steps * (tokens - 1)

    return run


def _median(values: list[float]) -> float:
    return statistics.median(values)


if __name__ == "__main__":
    main()

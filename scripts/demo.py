"""Answers one prompt as a stream, then compares decoding speed with transformers, one prompt of each kind.

The sample is fixed: of the prompts that ``medusa-export bench`` uses, the first one of each kind. For each prompt the
contestants answer one after the other, in an order drawn from a fixed seed, so a slow moment affects all.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from medusa_export.benchmarks.contestants import Generation, engine_contestant
from medusa_export.benchmarks.peers import transformers_contestant
from medusa_export.benchmarks.prompts import BenchPrompt, bench_prompts
from medusa_export.benchmarks.speeds import Speed, race, speeds
from medusa_runtime import MedusaEngine
from medusa_runtime.common.cpus import usable_cpus

STREAMED_TOKENS = 96
COMPARED_TOKENS = 128
PLAIN, TREE, REFERENCE = "plain decoding", "medusa", "transformers"


def main(bundle: str, model_path: str, prompt: str) -> None:
    """Streams the answer, prints the tables, and exits with 1 if the answers differ."""
    console = Console()
    started = time.perf_counter()
    # Everyone gets the same number of threads; without one torch takes one per physical core.
    with MedusaEngine.load(bundle, threads=usable_cpus()) as engine:
        loading = time.perf_counter() - started
        stream_answer(console, engine, prompt)
        sample = first_of_each_kind(bench_prompts())
        answers = compare(console, engine, model_path, sample)
    console.print(speed_table(answers, [entry.category for entry in sample]))
    console.print(setup_summary(loading))
    if not all(speed.identical for speed in speeds(answers, REFERENCE).values()):
        console.print("[bold red]The answers differ.[/bold red]")
        sys.exit(1)
    console.print("Every token of every answer is the one that transformers gives.")


def stream_answer(console: Console, engine: MedusaEngine, prompt: str) -> None:
    """Prints the answer to one prompt while it is decoded."""
    console.print(f"\n[bold]{prompt}[/bold]\n")
    for chunk in engine.stream([{"role": "user", "content": prompt}], max_new_tokens=STREAMED_TOKENS):
        console.out(chunk.text, end="", highlight=False)
    console.print("\n")


def first_of_each_kind(prompts: list[BenchPrompt]) -> list[BenchPrompt]:
    """The first prompt of each category, in the order of the file."""
    first: dict[str, BenchPrompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.category, prompt)
    return list(first.values())


def compare(
    console: Console, engine: MedusaEngine, model_path: str, sample: list[BenchPrompt]
) -> dict[str, list[list[Generation]]]:
    """Answers of each contestant, [repeat][prompt], with one repeat."""
    assert engine.tokenizer is not None
    ids = [engine.tokenizer.encode_chat([{"role": "user", "content": entry.prompt}]) for entry in sample]
    with console.status("loading transformers"):
        contestants = {
            REFERENCE: transformers_contestant(model_path, usable_cpus(), engine.bundle.model.eos_token_ids),
            PLAIN: engine_contestant(engine, 1),
            TREE: engine_contestant(engine, "auto"),
        }
        for contestant in contestants.values():
            contestant(ids[0], 8)  # first steps are slower
    with console.status(f"answering {len(ids)} prompts three times"):
        return race(contestants, PLAIN, ids, max_new_tokens=COMPARED_TOKENS, repeats=1)


def speed_table(answers: dict[str, list[list[Generation]]], kinds: list[str]) -> Table:
    """Speeds by kind of prompt, and over all prompts."""
    table = Table(
        title=f"tokens/s: greedy, fp32, answers of up to {COMPARED_TOKENS} tokens, {usable_cpus()} threads",
        caption=f"Prompts: the first of each kind in the {len(bench_prompts())} of 'medusa-export bench'.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("prompt", no_wrap=True)
    for heading in ("transformers", "plain", "medusa", "tokens\nper step", "medusa :\nplain", "medusa :\ntransformers"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in kinds:
        table.add_row(kind, *row(answers, lambda other, kind=kind: other == kind, kinds))
    table.add_section()
    table.add_row("all", *row(answers, lambda _: True, kinds), style="bold")
    return table


def row(answers: dict[str, list[list[Generation]]], wanted: Callable[[str], bool], kinds: list[str]) -> list[str]:
    """The cells of a table's row, over the prompts of the wanted kinds."""
    part = {
        name: [[answer for answer, kind in zip(repeat, kinds, strict=True) if wanted(kind)] for repeat in repeats]
        for name, repeats in answers.items()
    }
    measured: dict[str, Speed] = speeds(part, PLAIN)
    reference, tree = measured[REFERENCE], measured[TREE]
    return [
        *(f"{measured[name].tokens_per_second:.1f}" for name in (REFERENCE, PLAIN, TREE)),
        f"{tree.tokens_per_step:.2f}",
        f"{tree.speedup:.2f}x",
        f"{tree.speedup / reference.speedup:.2f}x",
    ]


def setup_summary(loading: float) -> str:
    """The time that each part of the set-up took; ``demo.sh`` measures the parts before this script."""
    parts = {
        "Python packages": float(os.environ.get("DEMO_INSTALL_SECONDS", "0")),
        "model download": float(os.environ.get("DEMO_DOWNLOAD_SECONDS", "0")),
        "export": float(os.environ.get("DEMO_EXPORT_SECONDS", "0")),
        "loading the bundle and measuring its steps": loading,
    }
    listed = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items())
    longest = max(parts, key=lambda name: parts[name])
    share = parts[longest] / max(sum(parts.values()), 1e-9)
    return f"Set-up: {listed}. Most of it ({share:.0%}): {longest}."


if __name__ == "__main__":
    main(*sys.argv[1:])

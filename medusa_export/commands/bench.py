"""``medusa-export bench``: measure decoding speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medusa_export.commands.command import Command, Failure
from medusa_export.commands.options import COUNT, PATH, option_with_default, quiet_option, sizes
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.extras import extra

if TYPE_CHECKING:
    from medusa_export import BenchResult


@click.command("bench", cls=Command)
@click.argument("bundle", type=PATH)
@click.option("--tree-sizes", callback=sizes, help="Tree sizes to measure, such as 4,8,16. [default: a few]")
@click.option(
    "--prompts",
    type=PATH,
    help="A file of JSON lines with category and prompt. [default: built-in prompts]",
)
@option_with_default(
    "-n",
    "--max-new-tokens",
    kind=click.IntRange(2),
    default=defaults.BENCH_TOKENS,
    text="Tokens to generate per prompt.",
)
@option_with_default(
    "--repeats", kind=COUNT, default=defaults.BENCH_REPEATS, text="Number of times that each prompt is answered."
)
@click.option("--threads", type=COUNT, help="CPU threads of each contestant. [default: all]")
@click.option("--plain", type=PATH, help="Also measure this bundle of the model without heads.")
@click.option("--model", help="Also measure transformers' generate with this model.")
@click.option(
    "--genai",
    type=PATH,
    multiple=True,
    help="Also measure onnxruntime-genai with this model's folder. May be given more than once.",
)
@click.option(
    "--llama-cpp",
    type=PATH,
    multiple=True,
    help="Also measure llama.cpp with this GGUF file. May be given more than once.",
)
@click.option("--json", "json_path", type=PATH, help="Write a JSON report to this file.")
@click.option("--markdown", type=PATH, help="Write tables to this file.")
@click.option("--plot", type=PATH, help="Write a plot of speed against tree size to this PNG.")
@click.option("--compare", type=PATH, help="Fail if a ratio is worse than in this earlier JSON report.")
@option_with_default(
    "--tolerance",
    kind=click.FloatRange(0),
    default=defaults.BENCH_TOLERANCE,
    text="Share by which a ratio may be worse than in --compare.",
)
@quiet_option
def command(
    bundle: Path,
    tree_sizes: tuple[int, ...] | None,
    prompts: Path | None,
    max_new_tokens: int,
    repeats: int,
    threads: int | None,
    plain: Path | None,
    model: str | None,
    genai: tuple[Path, ...],
    llama_cpp: tuple[Path, ...],
    json_path: Path | None,
    markdown: Path | None,
    plot: Path | None,
    compare: Path | None,
    tolerance: float,
    quiet: bool,
) -> None:
    """Measure BUNDLE: tokens per second, tokens per step, and the cost of a step.

    All contestants answer in turns, and are compared with plain decoding (tree size 1) in the same engine.
    """
    with shown_progress(quiet=quiet) as on_progress:
        from medusa_export import BenchPeers, bench, bench_prompts
        from medusa_export.benchmarks.report import earlier_report, regressions
        from medusa_export.common.files import check_files

        if plot is not None:
            with extra("train"):
                from medusa_export.plots import plot_sizes
        check_files(json_path, markdown, plot)
        asked = None if prompts is None else bench_prompts(prompts)
        earlier = None if compare is None else earlier_report(compare)  # read now, as the report may replace it
        result = bench(
            bundle,
            tree_sizes=tree_sizes,
            prompts=asked,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            threads=threads,
            peers=BenchPeers(plain, model, genai, llama_cpp),
            on_progress=on_progress,
        )
    _write(result, json_path, markdown)
    if plot is not None:
        plot_sizes(result.sizes, result.auto, plot)
    _show(result)
    if earlier is not None and (behind := regressions(result.figures(), earlier, tolerance)):
        raise Failure(f"This is behind {compare}: {'; '.join(behind)}.")


def _write(result: BenchResult, json_path: Path | None, markdown: Path | None) -> None:
    """Writes the reports that are asked for."""
    from medusa_export.benchmarks.report import as_markdown
    from medusa_export.common.files import write_text

    if json_path is not None:
        write_text(json_path, json.dumps(result.figures(), indent=1) + "\n")
    if markdown is not None:
        write_text(markdown, as_markdown(result.speeds, result.categories))


def _show(result: BenchResult) -> None:
    """Prints the table of speeds, and sentences about it."""
    from rich.console import Console

    from medusa_export.benchmarks.report import as_table, own_weights

    Console().print(as_table(result.speeds))
    for sentence in own_weights(result.speeds):
        click.echo(sentence)
    if result.rows_differ:
        click.echo("Tokens of this bundle may differ between tree sizes: see docs/concepts/exact.md.")
    auto = result.auto
    click.echo(
        f"'auto' verifies {auto.nodes_per_step:.2g} nodes/step: {auto.tokens_per_step:.2f} tokens/step, "
        f"{auto.speedup:.2f} times the speed of plain decoding in the same engine."
    )

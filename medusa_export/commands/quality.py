"""``medusa-export quality``: measure what quantization costs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import COUNT, PATH, option_with_default, quiet_option, text_only_option
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.extras import extra


@click.command("quality", cls=Command)
@click.argument("bundles", type=PATH, nargs=-1, required=True)
@click.option("--model", required=True, help="The unquantized model: a folder, a hub id or a .gguf file.")
@click.option("--heads", metavar="PATH", help="The heads that the bundles were exported with: measure them, too.")
@click.option(
    "--data",
    type=PATH,
    multiple=True,
    help="A folder of 'distill', whose held-out part is used, or a file of conversations. May be given more than once. "
    "[default: MODEL's answers to the prompts of 'bench']",
)
@click.option("--texts", type=PATH, multiple=True, help="A file of plain text. May be given more than once.")
@option_with_default(
    "--max-length", kind=click.IntRange(3), default=defaults.QUALITY_LENGTH, text="Largest number of tokens of a text."
)
@click.option("--limit", type=COUNT, help="Largest number of texts.")
@click.option("--threads", type=COUNT, help="CPU threads. [default: all]")
@click.option("--json", "json_path", type=PATH, help="Write a JSON report to this file.")
@click.option("--plot", type=PATH, help="Write a plot to this PNG.")
@text_only_option
@quiet_option
def command(
    bundles: tuple[Path, ...],
    model: str,
    heads: str | None,
    data: tuple[Path, ...],
    texts: tuple[Path, ...],
    max_length: int,
    limit: int | None,
    threads: int | None,
    json_path: Path | None,
    plot: Path | None,
    text_only: bool,
    quiet: bool,
) -> None:
    """Measure what quantization costs: BUNDLES against the model that they were made of, on held-out text.

    It shows perplexity, KL divergence and the share of equal choices. Logits are those of each bundle's own graph in
    ONNX Runtime. With --heads it also shows how often heads are right, computed in PyTorch with each bundle's integers.
    """
    with shown_progress(quiet=quiet) as on_progress:
        with extra("train"):
            from medusa_export import quality
            from medusa_export.common.files import check_files, write_text
            from medusa_export.evaluation.report import closeness_table, heads_table
            from medusa_export.plots import plot_quality

        check_files(json_path, plot)
        found = quality(
            bundles,
            model,
            heads=heads,
            data=data,
            texts=texts,
            max_length=max_length,
            limit=limit,
            threads=threads,
            text_only=text_only,
            on_progress=on_progress,
        )
    if json_path is not None:
        write_text(json_path, json.dumps(found.figures(), indent=1) + "\n")
    if plot is not None:
        plot_quality(found, plot)
    from rich.console import Console

    console = Console()
    for table in (closeness_table(found), heads_table(found)):
        if table is not None:
            console.print(table)

"""``medusa-export calibrate``: measure how often heads are right."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.options import Command
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.dtypes import DTYPES, Dtype
from medusa_export.common.extras import extra


@click.command("calibrate", cls=Command)
@click.argument("model")
@click.option(
    "--heads", metavar="PATH", required=True, help="The heads: a file, a folder or a hub id, in any published format."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="A folder of 'distill', whose held-out part is used, or a file of conversations. May be given more than once.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The JSON file to write.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also write a plot to this PNG.")
@click.option(
    "--max-length",
    type=click.IntRange(3),
    default=defaults.MAX_LENGTH,
    show_default=True,
    help="Largest number of tokens of a conversation.",
)
@click.option("--strict", is_flag=True, help="Refuse data with rows that can't be used, instead of skipping them.")
@click.option("--lookup/--no-lookup", default=True, show_default=True, help="Count the runtime's lookup hits, too.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Type of the model's weights. [default: bf16 on a GPU, else fp32]"
)
@click.option("--device", help="The device to run on, such as cuda:1. [default: the GPU, if there is one]")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def command(
    model: str,
    heads: str,
    data: tuple[Path, ...],
    output: Path,
    plot: Path | None,
    max_length: int,
    strict: bool,
    lookup: bool,
    dtype: Dtype | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Measure how often the heads of MODEL are right, by head and rank, on text that they were not trained on.

    'medusa-export tree' searches the best tree for the result, and 'medusa-export onnx --calibration' gives the runtime
    acceptance estimates from it.
    """
    with shown_progress(quiet=quiet) as on_progress:
        with extra("train"):
            from medusa_export import calibrate
            from medusa_export.plots import plot_calibration
            from medusa_export.training.report import calibration_table

        calibration = calibrate(
            model,
            heads,
            data,
            max_length=max_length,
            strict=strict,
            lookup=lookup,
            dtype=dtype,
            device=device,
            on_progress=on_progress,
        )
        calibration.save(output)
        if plot is not None:
            plot_calibration(calibration, plot)
    from rich.console import Console

    Console().print(calibration_table(calibration))

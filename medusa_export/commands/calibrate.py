"""``medusa-export calibrate``: measure how often heads are right."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import (
    PATH,
    data_option,
    device_option,
    dtype_option,
    heads_option,
    option_with_default,
    output_option,
    quiet_option,
    strict_option,
    text_only_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.dtypes import Dtype
from medusa_export.common.extras import extra


@click.command("calibrate", cls=Command)
@click.argument("model")
@heads_option
@data_option("A folder of 'distill', whose held-out part is used, or a file of conversations")
@output_option("The JSON file to write.")
@click.option("--plot", type=PATH, help="Also write a plot to this PNG.")
@option_with_default(
    "--max-length",
    kind=click.IntRange(3),
    default=defaults.MAX_LENGTH,
    text="Largest number of tokens of a conversation.",
)
@strict_option("data")
@click.option("--lookup/--no-lookup", default=True, show_default=True, help="Count the runtime's lookup hits, too.")
@click.option("--bundle", type=PATH, help="Use the integers of this bundle in the place of the matrices of MODEL.")
@dtype_option("the model's")
@device_option
@text_only_option
@quiet_option
def command(
    model: str,
    heads: str,
    data: tuple[Path, ...],
    output: Path,
    plot: Path | None,
    max_length: int,
    strict: bool,
    lookup: bool,
    bundle: Path | None,
    dtype: Dtype | None,
    device: str | None,
    text_only: bool,
    quiet: bool,
) -> None:
    """Measure how often the heads of MODEL are right, by head and rank, on text that they were not trained on.

    'medusa-export tree' searches the best tree for the result, and 'medusa-export onnx --calibration' gives the runtime
    acceptance estimates from it.
    """
    with shown_progress(quiet=quiet) as on_progress:
        with extra("train"):
            from medusa_export import calibrate
            from medusa_export.common.files import check_files
            from medusa_export.plots import plot_calibration
            from medusa_export.training.report import calibration_table

        check_files(output, plot)
        calibration = calibrate(
            model,
            heads,
            data,
            max_length=max_length,
            strict=strict,
            lookup=lookup,
            bundle=bundle,
            dtype=dtype,
            device=device,
            text_only=text_only,
            on_progress=on_progress,
        )
        calibration.save(output)
        if plot is not None:
            plot_calibration(calibration, plot)
    from rich.console import Console

    Console().print(calibration_table(calibration))

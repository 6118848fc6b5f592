"""``medusa-export activations``: measure the ranges of a model's activations."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import (
    COUNT,
    data_option,
    device_option,
    option_with_default,
    output_option,
    quiet_option,
    strict_option,
    text_only_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.extras import extra


@click.command("activations", cls=Command)
@click.argument("model")
@data_option("A folder of 'distill', whose part for training is used, or a file of conversations")
@output_option("The safetensors file to write.")
@option_with_default(
    "--max-length",
    kind=click.IntRange(3),
    default=defaults.MAX_LENGTH,
    text="Largest number of tokens of a conversation.",
)
@option_with_default(
    "--samples", kind=COUNT, default=defaults.ACTIVATION_SAMPLES, text="Largest number of conversations."
)
@strict_option("data")
@device_option
@text_only_option
@quiet_option
def command(
    model: str,
    data: tuple[Path, ...],
    output: Path,
    max_length: int,
    samples: int,
    strict: bool,
    device: str | None,
    text_only: bool,
    quiet: bool,
) -> None:
    """Measure the ranges of the inputs of MODEL's linear layers over text.

    'medusa-export onnx --weights int8 --activations' rounds these inputs to 8 bits, which makes large trees cheap on
    CPUs.
    """
    with shown_progress(quiet=quiet) as on_progress:
        with extra("train"):
            from medusa_export import activations
            from medusa_export.common.files import check_files

        check_files(output)
        ranges = activations(
            model,
            data,
            max_length=max_length,
            samples=samples,
            strict=strict,
            device=device,
            text_only=text_only,
            on_progress=on_progress,
        )
        ranges.save(output)

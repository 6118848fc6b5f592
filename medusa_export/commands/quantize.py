"""``medusa-export quantize``: round the weights of a model with GPTQ."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import (
    COUNT,
    data_option,
    device_option,
    dtype_option,
    names,
    option_with_default,
    output_option,
    overwrite_option,
    quiet_option,
    text_only_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.dtypes import INTEGER_TYPES, Dtype, IntegerType
from medusa_export.common.extras import extra


@click.command("quantize", cls=Command)
@click.argument("model")
@data_option("A folder of 'distill', whose part for training is used, or a file of conversations")
@output_option("The folder to write.")
@option_with_default(
    "--weights", kind=click.Choice(INTEGER_TYPES), default=defaults.QUANTIZED_WEIGHTS, text="Type of the integers."
)
@click.option(
    "--wide",
    callback=names,
    help="Modules that are int8 in any case, by the last part of their names: v_proj,down_proj.",
)
@option_with_default(
    "--block-size",
    kind=click.IntRange(16),
    default=defaults.BLOCK_SIZE,
    text="Columns of a matrix that share a scale, a power of two.",
)
@click.option(
    "--no-smoothing",
    is_flag=True,
    help="Leave the sizes of columns as they are. By default they are balanced between the inputs and the weights of "
    "linear layers, so that products lose less when they round their inputs to 8 bits.",
)
@option_with_default(
    "--max-length",
    kind=click.IntRange(3),
    default=defaults.QUALITY_LENGTH,
    text="Largest number of tokens of a conversation.",
)
@click.option("--limit", type=COUNT, help="Largest number of conversations.")
@dtype_option("the model's")
@device_option
@overwrite_option("a model")
@text_only_option
@quiet_option
def command(
    model: str,
    data: tuple[Path, ...],
    output: Path,
    weights: IntegerType,
    wide: tuple[str, ...],
    block_size: int,
    no_smoothing: bool,
    max_length: int,
    limit: int | None,
    dtype: Dtype | None,
    device: str | None,
    overwrite: bool,
    text_only: bool,
    quiet: bool,
) -> None:
    """Round the weights of MODEL with GPTQ, so that its layers compute nearly the same on conversations like --data.

    The result is a checkpoint of compressed-tensors. 'medusa-export onnx OUTPUT --weights int4' stores its integers as
    they are, and 'medusa-export quality' measures the bundle.
    """
    with shown_progress(quiet=quiet) as on_progress:
        with extra("train"):
            from medusa_export import quantize

        made = quantize(
            model,
            output,
            data,
            weights=weights,
            wide=wide,
            block_size=block_size,
            smoothing=not no_smoothing,
            max_length=max_length,
            limit=limit,
            dtype=dtype,
            device=device,
            overwrite=overwrite,
            text_only=text_only,
            on_progress=on_progress,
        )
    bits = sum(matrix.bits * matrix.values.numel() for matrix in made.values())
    values = sum(matrix.values.numel() for matrix in made.values())
    click.echo(f"{output}: {len(made)} matrices of {bits / values:.2f} bits on average, without scales")

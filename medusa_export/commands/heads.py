"""``medusa-export heads``: work with files of heads."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import (
    heads_option,
    option_with_default,
    output_option,
    quiet_option,
    text_only_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.dtypes import DTYPES, Dtype


@click.group("heads")
def command() -> None:
    """Work with files of heads."""


@command.command("convert", cls=Command)
@click.argument("model")
@heads_option
@output_option("The folder to write.")
@option_with_default(
    "--format",
    "layout",
    kind=click.Choice(["own", "v0.1", "v2", "vllm"]),
    default=defaults.HEADS_LAYOUT,
    text="own is the smallest that holds everything; v0.1 and v2 are the reference implementation's; vllm is vLLM's.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of the weights in the file. [default: as given]")
@text_only_option
@quiet_option
def convert(
    model: str, heads: str, output: Path, layout: str, dtype: Dtype | None, text_only: bool, quiet: bool
) -> None:
    """Write the heads of MODEL in another format."""
    with shown_progress(quiet=quiet) as on_progress:
        from medusa_export import convert_heads

        convert_heads(model, heads, output, layout=layout, dtype=dtype, text_only=text_only, on_progress=on_progress)

"""``medusa-export triton``: write a model repository of Triton Inference Server."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import (
    COUNT,
    PATH,
    option_with_default,
    output_option,
    overwrite_option,
    quiet_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults


@click.command("triton", cls=Command)
@click.argument("bundle", type=PATH)
@output_option("The model repository. It may hold other models.")
@click.option("--name", help="Name of the model. [default: the name of BUNDLE's folder]")
@option_with_default("--rows", kind=COUNT, default=defaults.SERVICE_ROWS, text="Requests that run at a time.")
@click.option("--copy", is_flag=True, help="Copy the bundle into the repository, instead of linking to it.")
@overwrite_option("a model of this name")
@quiet_option
def command(bundle: Path, output: Path, name: str | None, rows: int, copy: bool, overwrite: bool, quiet: bool) -> None:
    """Write a model of Triton Inference Server that answers with BUNDLE."""
    with shown_progress(quiet=quiet) as on_progress:
        from medusa_export import write_triton_repository

        folder = write_triton_repository(
            bundle, output, name=name, rows=rows, copy=copy, overwrite=overwrite, on_progress=on_progress
        )
    click.echo(folder)

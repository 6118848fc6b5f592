"""``medusa-export trt``: compile a bundle to a TensorRT engine."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import (
    COUNT,
    PATH,
    names,
    option_with_default,
    output_option,
    overwrite_option,
    quiet_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults

FLAVORS = ("auto", "tensorrt", "tensorrt-rtx")


@click.command("trt", cls=Command)
@click.argument("bundle", type=PATH)
@output_option("The folder to write.")
@option_with_default(
    "--flavor",
    kind=click.Choice(FLAVORS),
    default=defaults.FLAVOR,
    text="The TensorRT to build with; auto is the one that is installed.",
)
@click.option(
    "--target",
    "targets",
    metavar="LIST",
    callback=names,
    help="GPU architectures to build for, such as sm86,sm89. [default: this machine's GPU]",
)
@option_with_default("--max-batch", kind=COUNT, default=defaults.MAX_BATCH, text="Rows: sequences at a time.")
@click.option(
    "--max-seq-len",
    type=COUNT,
    help="Slots per row in the caches, for prompt, answer and the tree in flight. [default: as many as the model's "
    "positions need, at most 4096]",
)
@click.option("--max-prefill", type=COUNT, help="Tokens of the longest chunk of a prompt. [default: at most 512]")
@option_with_default(
    "--opt-level", kind=click.IntRange(0, 5), default=defaults.OPT_LEVEL, text="The builder's optimization level."
)
@click.option(
    "--timing-cache",
    type=PATH,
    help="A file that keeps measured kernels for later builds; for tensorrt only.",
)
@overwrite_option("an engine")
@quiet_option
def command(
    bundle: Path,
    output: Path,
    flavor: str,
    targets: tuple[str, ...],
    max_batch: int,
    max_seq_len: int | None,
    max_prefill: int | None,
    opt_level: int,
    timing_cache: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Compile BUNDLE to a TensorRT engine, in a folder that the runtime loads like a bundle.

    With --target this needs no GPU. Weights and caches have the bundle's type, so export it with --dtype fp16.
    """
    with shown_progress(quiet=quiet) as on_progress:
        from medusa_export import build_engine

        build_engine(
            bundle,
            output,
            flavor=flavor,
            targets=targets,
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            max_prefill=max_prefill,
            opt_level=opt_level,
            timing_cache=timing_cache,
            overwrite=overwrite,
            on_progress=on_progress,
        )

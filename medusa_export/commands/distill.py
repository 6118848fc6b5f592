"""``medusa-export distill``: have a model write the data that its heads are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import (
    COUNT,
    PATH,
    device_option,
    dtype_option,
    option_with_default,
    output_option,
    quiet_option,
    strict_option,
    text_only_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common.dtypes import Dtype
from medusa_export.training.options import OWN_PROMPTS, DistillOptions

DEFAULT = DistillOptions()


@click.command("distill", cls=Command)
@click.argument("model")
@output_option("The folder of the data set.")
@click.option(
    "--prompts",
    multiple=True,
    type=PATH,
    help="A file of prompts: .txt, or .json(l) with messages, conversations (ShareGPT), data (UltraChat) or prompt. "
    "May be given more than once.",
)
@click.option(
    "--magpie",
    type=click.IntRange(0),
    help=f"Prompts that the model writes itself, from its chat template. [default: {OWN_PROMPTS} without --prompts]",
)
@strict_option("files")
@click.option("--limit", type=COUNT, help="Largest number of conversations.")
@option_with_default("--turns", kind=COUNT, default=DEFAULT.turns, text="User turns per conversation.")
@click.option("--system", help="A system message.")
@option_with_default(
    "-n", "--max-new-tokens", kind=COUNT, default=DEFAULT.max_new_tokens, text="Largest number of tokens of an answer."
)
@option_with_default(
    "--temperature", kind=click.FloatRange(0), default=DEFAULT.temperature, text="Temperature of answers; 0 is greedy."
)
@option_with_default(
    "--prompt-temperature",
    kind=click.FloatRange(0),
    default=DEFAULT.prompt_temperature,
    text="Temperature of prompts that the model writes.",
)
@option_with_default(
    "--heldout", kind=click.FloatRange(0, 1), default=DEFAULT.heldout, text="Share of prompts to hold out."
)
@option_with_default("--batch-size", kind=COUNT, default=DEFAULT.batch_size, text="Conversations at a time.")
@click.option("--seed", default=DEFAULT.seed, show_default=True, help="Seed of all randomness.")
@dtype_option("the")
@device_option
@text_only_option
@quiet_option
def command(
    model: str,
    output: Path,
    prompts: tuple[Path, ...],
    strict: bool,
    dtype: Dtype | None,
    device: str | None,
    text_only: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Have MODEL write the data that its heads are trained on.

    It answers prompts from files, or prompts that it writes itself. After an interruption, the same command goes on
    where it stopped. OUTPUT/train.jsonl and OUTPUT/heldout.jsonl load with the datasets library.
    """
    with shown_progress(quiet=quiet) as on_progress:
        from medusa_export import distill

        made = distill(
            model,
            output,
            prompts=prompts,
            options=DistillOptions(**options),
            strict=strict,
            dtype=dtype,
            device=device,
            text_only=text_only,
            on_progress=on_progress,
        )
    for name, split in made.splits.items():
        click.echo(f"{output / name}.jsonl: {split.rows:,} conversations, {split.tokens:,} tokens written")

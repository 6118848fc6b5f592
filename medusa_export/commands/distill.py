"""``medusa-export distill``: have a model write the data that its heads are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from medusa_export.commands.options import Command
from medusa_export.commands.progress import shown_progress
from medusa_export.common.dtypes import DTYPES, Dtype
from medusa_export.training.options import OWN_PROMPTS, DistillOptions

DEFAULT = DistillOptions()


@click.command("distill", cls=Command)
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder of the data set.")
@click.option(
    "--prompts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file of prompts: .txt, or .json(l) with messages, conversations (ShareGPT), data (UltraChat) or prompt. "
    "May be given more than once.",
)
@click.option(
    "--magpie",
    type=click.IntRange(0),
    help=f"Prompts that the model writes itself, from its chat template. [default: {OWN_PROMPTS} without --prompts]",
)
@click.option("--strict", is_flag=True, help="Refuse files with rows that can't be used, instead of skipping them.")
@click.option("--limit", type=click.IntRange(1), help="Largest number of conversations.")
@click.option(
    "--turns", type=click.IntRange(1), default=DEFAULT.turns, show_default=True, help="User turns per conversation."
)
@click.option("--system", help="A system message.")
@click.option(
    "-n",
    "--max-new-tokens",
    type=click.IntRange(1),
    default=DEFAULT.max_new_tokens,
    show_default=True,
    help="Largest number of tokens of an answer.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=DEFAULT.temperature,
    show_default=True,
    help="Temperature of answers; 0 is greedy.",
)
@click.option(
    "--prompt-temperature",
    type=click.FloatRange(0),
    default=DEFAULT.prompt_temperature,
    show_default=True,
    help="Temperature of prompts that the model writes.",
)
@click.option(
    "--heldout",
    type=click.FloatRange(0, 1),
    default=DEFAULT.heldout,
    show_default=True,
    help="Share of prompts to hold out.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=DEFAULT.batch_size,
    show_default=True,
    help="Conversations at a time.",
)
@click.option("--seed", default=DEFAULT.seed, show_default=True, help="Seed of all randomness.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Type of the weights. [default: bf16 on a GPU, else fp32]")
@click.option("--device", help="The device to run on, such as cuda:1. [default: the GPU, if there is one]")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def command(
    model: str,
    output: Path,
    prompts: tuple[Path, ...],
    strict: bool,
    dtype: Dtype | None,
    device: str | None,
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
            on_progress=on_progress,
        )
    for name, split in made.splits.items():
        click.echo(f"{output / name}.jsonl: {split.rows:,} conversations, {split.tokens:,} tokens written")

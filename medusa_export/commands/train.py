"""``medusa-export train``: train heads on conversations."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import (
    COUNT,
    POSITIVE,
    data_option,
    dtype_option,
    option_with_default,
    output_option,
    quiet_option,
    strict_option,
    text_only_option,
)
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.dtypes import DTYPES, Dtype
from medusa_export.common.extras import extra
from medusa_export.training.options import HeadShape, HiddenStates, Recipe, TrainOptions

SHAPE, DEFAULT = HeadShape(), TrainOptions()
_SHAPE_OPTIONS = tuple(field.name for field in fields(HeadShape))


@click.command("train", cls=Command)
@click.argument("model")
@data_option("A folder of 'distill', or a file of conversations")
@output_option("The folder of the heads.")
@option_with_default(
    "--recipe",
    kind=click.Choice(get_args(Recipe)),
    default=DEFAULT.recipe,
    text="medusa1 trains the heads alone and leaves the model as it is; medusa2 then trains the model with LoRA, too.",
)
@click.option("--heads", metavar="PATH", help="Heads to train further; with medusa2 they replace the first stage.")
@option_with_default("--num-heads", kind=click.IntRange(1, 16), default=SHAPE.num_heads, text="Number of heads.")
@option_with_default(
    "--head-architecture",
    "architecture",
    kind=click.STRING,
    default=SHAPE.architecture,
    text="The head architecture of new heads: medusa, or one of an installed package.",
)
@option_with_default("--num-layers", kind=COUNT, default=SHAPE.num_layers, text="Residual blocks per head.")
@click.option(
    "--conditioned/--plain",
    default=SHAPE.conditioned,
    show_default=True,
    help="Give heads the token that the base model has just chosen, or the hidden state alone as in the paper.",
)
@click.option("--draft-vocab", type=COUNT, help="Let heads propose only this number of tokens, the most frequent.")
@click.option("--own-projections", is_flag=True, help="Train an output projection for each head, as in the paper.")
@option_with_default("--epochs", kind=POSITIVE, default=DEFAULT.epochs, text="Passes over the data.")
@option_with_default("--learning-rate", kind=POSITIVE, default=DEFAULT.learning_rate, text="Highest learning rate.")
@option_with_default(
    "--soft",
    kind=click.FloatRange(0, 1),
    default=DEFAULT.soft,
    text="Share of the loss that asks for the base model's distribution instead of its token. It needs hidden states "
    "that are kept.",
)
@option_with_default("--batch-size", kind=COUNT, default=DEFAULT.batch_size, text="Positions per step and process.")
@option_with_default(
    "--hidden-states",
    kind=click.Choice(get_args(HiddenStates)),
    default=DEFAULT.hidden_states,
    text="Keep the model's hidden states on disk, or compute them in every epoch. auto keeps them if they fit.",
)
@option_with_default(
    "--conversations",
    kind=COUNT,
    default=DEFAULT.conversations,
    text="Conversations per step and process, in stages that run the model.",
)
@option_with_default(
    "--joint-epochs", kind=POSITIVE, default=DEFAULT.joint_epochs, text="medusa2: passes over the data with LoRA."
)
@option_with_default(
    "--joint-learning-rate",
    kind=POSITIVE,
    default=DEFAULT.joint_learning_rate,
    text="medusa2: highest learning rate of LoRA.",
)
@option_with_default(
    "--heads-rate",
    kind=POSITIVE,
    default=DEFAULT.heads_rate,
    text="medusa2: the heads' learning rate divided by LoRA's.",
)
@option_with_default("--lora-rank", kind=COUNT, default=DEFAULT.lora_rank, text="medusa2: rank of LoRA.")
@option_with_default(
    "--lora-dropout",
    kind=click.FloatRange(0, 1, max_open=True),
    default=DEFAULT.lora_dropout,
    text="medusa2: dropout of LoRA. Without it, a step takes three quarters of the time on a CPU.",
)
@option_with_default(
    "--heads-weight",
    kind=click.FloatRange(0),
    default=DEFAULT.heads_weight,
    text="medusa2: weight of the heads' loss against the loss that keeps the model as it was.",
)
@option_with_default(
    "--max-length",
    kind=click.IntRange(3),
    default=DEFAULT.max_length,
    text="Largest number of tokens of a conversation.",
)
@click.option("--limit", type=COUNT, help="Largest number of conversations to train on, of each --data.")
@option_with_default(
    "--heldout",
    kind=click.FloatRange(0, 1),
    default=DEFAULT.heldout,
    text="Share of prompts to hold out, if --data is a file.",
)
@strict_option("data")
@option_with_default(
    "--save-dtype",
    kind=click.Choice(DTYPES),
    default=defaults.HEADS_DTYPE,
    text="Type of the weights in the file of heads.",
)
@dtype_option("the base model's")
@click.option("--bf16/--no-bf16", default=None, help="Compute matrix products in bf16. [default: on a GPU]")
@click.option(
    "--seed", default=DEFAULT.seed, show_default=True, help="Seed of initial weights and of the order of the data."
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="The device to train on; CUDA_VISIBLE_DEVICES chooses the GPU. [default: a GPU, if there is one]",
)
@text_only_option
@quiet_option
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str,
    data: tuple[Path, ...],
    output: Path,
    heads: str | None,
    strict: bool,
    save_dtype: Dtype,
    dtype: Dtype | None,
    device: str | None,
    text_only: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Train heads for MODEL.

    After an interruption, the same command goes on from the last checkpoint in OUTPUT; any other is refused. The heads
    load with 'medusa-export onnx MODEL --heads OUTPUT'. The model of medusa2 is OUTPUT/model.
    """
    _check_shape(context, heads)
    shape = HeadShape(**{name: options.pop(name) for name in _SHAPE_OPTIONS})
    with shown_progress(quiet=quiet) as on_progress:
        with extra("train"):
            from medusa_export import train
            from medusa_export.plots import plot_training
            from medusa_export.training.report import accuracy_table, quality_line

        trained = train(
            model,
            data,
            output,
            heads=heads,
            shape=shape if heads is None else None,
            options=TrainOptions(**options),
            strict=strict,
            save_dtype=save_dtype,
            dtype=dtype,
            device=device,
            text_only=text_only,
            on_progress=on_progress,
        )
        if not trained.is_main:
            return
        for name, history in trained.histories.items():
            plot_training(history, trained.num_heads, output / f"{name}.png")
    from rich.console import Console

    Console().print(accuracy_table(trained.heldout, trained.num_heads))
    if trained.merged_perplexity is not None:
        click.echo(quality_line(trained.heldout, trained.merged_perplexity))


def _check_shape(context: click.Context, heads: str | None) -> None:
    """Refuses options that shape fresh heads if there are others, because they would have no effect."""
    if heads is None:
        return
    default = click.core.ParameterSource.DEFAULT
    given = next((name for name in _SHAPE_OPTIONS if context.get_parameter_source(name) is not default), None)
    if given is not None:
        option = next(option for option in context.command.params if option.name == given)
        words = " and ".join((*option.opts, *option.secondary_opts))
        raise click.UsageError(f"Heads given with --heads have their shape: leave {words} out, or train fresh ones.")

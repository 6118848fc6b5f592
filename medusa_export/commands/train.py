"""``medusa-export train``: train heads on what a model wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medusa_export.commands.options import DTYPES, Progress, extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medusa_export.training.dataset import TokenizedData
    from medusa_export.training.processes import Processes

# Options that a training may go on without; or what stands for them is compared: of data and weights their digests.
NOT_IN_THE_RESULT = {"output", "device", "hidden_states", "save_dtype", "quiet", "strict", "model", "data", "heads"}

# Of fresh heads alone.
_SHAPE = ("num_heads", "num_layers", "conditioned", "draft_vocab")


@click.command("train")
@click.argument("model")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="What 'distill' wrote, or a file of conversations. May be given more than once.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the heads.")
@click.option(
    "--recipe",
    type=click.Choice(["medusa1", "medusa2"]),
    default="medusa1",
    show_default=True,
    help="Train heads alone, which leaves the model as it is; or then, with LoRA, the model for them.",
)
@click.option("--heads", metavar="PATH", help="Train these on, not fresh ones; for medusa2 instead of its first stage.")
@click.option("--num-heads", type=click.IntRange(1, 16), default=4, show_default=True)
@click.option("--num-layers", type=click.IntRange(1), default=1, show_default=True, help="Residual blocks per head.")
@click.option(
    "--conditioned/--plain",
    default=True,
    show_default=True,
    help="Give heads the token that the base model has just chosen, or the hidden state alone as in the paper.",
)
@click.option("--draft-vocab", type=click.IntRange(1), help="Let heads propose only so many tokens, the most frequent.")
@click.option("--own-projections", is_flag=True, help="A trained output projection per head, as in the paper.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=2e-3, show_default=True)
@click.option(
    "--soft",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="How much of the loss asks for the base model's distribution instead of its token alone; with hidden states "
    "that are kept.",
)
@click.option("--batch-size", type=click.IntRange(1), default=2048, show_default=True,
              help="Positions per step and process.")  # fmt: skip
@click.option(
    "--hidden-states",
    type=click.Choice(["auto", "cached", "online"]),
    default="auto",
    show_default=True,
    help="Keep the model's hidden states on disk, or compute them in every epoch. auto: keep them if they fit.",
)
@click.option(
    "--conversations",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Per step and process, where the model runs too.",
)
@click.option(
    "--joint-epochs",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="medusa2: with LoRA.",
)
@click.option("--joint-learning-rate", type=click.FloatRange(0, min_open=True), default=5e-4, show_default=True,
              help="medusa2: LoRA's.")  # fmt: skip
@click.option("--heads-rate", type=click.FloatRange(0, min_open=True), default=4.0, show_default=True,
              help="medusa2: the heads' learning rate over LoRA's.")  # fmt: skip
@click.option("--lora-rank", type=click.IntRange(1), default=32, show_default=True, help="medusa2.")
@click.option("--lora-dropout", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True,
              help="medusa2; without any, a step takes three quarters of the time on a CPU.")  # fmt: skip
@click.option("--heads-weight", type=click.FloatRange(0), default=0.01, show_default=True,
              help="medusa2: what the heads count against staying what the model was.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(3), default=2048, show_default=True, help="Tokens of a conversation.")
@click.option("--limit", type=click.IntRange(1), help="Conversations to train on, at most, of each --data.")
@click.option("--heldout", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="If --data is a file.")
@click.option("--strict", is_flag=True, help="Refuse data with rows that can't be used, instead of skipping them.")
@click.option("--save-dtype", type=click.Choice(list(DTYPES)), default="fp16", show_default=True, help="Of the file.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the base model. [default: bf16 on a GPU, else fp32]")
@click.option("--bf16/--no-bf16", default=None, help="Matrix products of the training in bf16. [default: on a GPU]")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="CUDA_VISIBLE_DEVICES chooses which. [default: a GPU, if any]"
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.pass_context
def command(
    context: click.Context,
    model: str,
    data: tuple[Path, ...],
    output: Path,
    recipe: str,
    heads: str | None,
    num_heads: int,
    num_layers: int,
    conditioned: bool,
    draft_vocab: int | None,
    own_projections: bool,
    epochs: float,
    learning_rate: float,
    soft: float,
    batch_size: int,
    hidden_states: str,
    conversations: int,
    joint_epochs: float,
    joint_learning_rate: float,
    heads_rate: float,
    lora_rank: int,
    lora_dropout: float,
    heads_weight: float,
    max_length: int,
    limit: int | None,
    heldout: float,
    strict: bool,
    save_dtype: str,
    dtype: str | None,
    bf16: bool | None,
    seed: int,
    device: str | None,
    quiet: bool,
) -> None:
    """Train heads for MODEL.

    Interrupted, the same command goes on from the last checkpoint in OUTPUT; any other is refused. The heads load with
    'medusa-export onnx MODEL --heads OUTPUT'; the model that medusa2 makes is OUTPUT/model.
    """
    progress = Progress(quiet=quiet)
    with extra("train"):
        import torch
        from rich.console import Console

        from medusa_export.common.files import write_text
        from medusa_export.models.checkpoints import load_model
        from medusa_export.plots import plot_training
        from medusa_export.training.device import dtype_of
        from medusa_export.training.job import HeadShape, TrainingJob
        from medusa_export.training.joint import Lora
        from medusa_export.training.processes import Processes
        from medusa_export.training.report import accuracy_table, held_out, quality_line
        from medusa_export.training.run import Schedule

    _check_shape(context, heads)
    processes = Processes(device)
    kind = dtype_of(dtype and DTYPES[dtype], processes.device)
    bf16 = processes.device.type == "cuda" if bf16 is None else bf16
    tokenizer, tokenized = _read(model, data, processes, heldout, limit, max_length, strict=strict)
    with processes.main_first():
        progress(f"loading {model}")
        base = load_model(model, dtype=getattr(torch, kind)).to(processes.device)
    job = TrainingJob(base, model, tokenizer, tokenized.samples, output, processes, max_length, quiet=quiet)
    trained = (
        job.fresh_heads(HeadShape(num_heads, num_layers, conditioned, draft_vocab, own_projections))
        if heads is None
        else job.loaded_heads(heads, projections=own_projections)
    )
    asked = {**context.params, "dtype": kind, "bf16": bf16}
    without = NOT_IN_THE_RESULT if heads is None else NOT_IN_THE_RESULT | {*_SHAPE}
    job.begin(trained, {name: value for name, value in asked.items() if name not in without}, tokenized.facts)
    histories = {}
    if recipe == "medusa1" or heads is None:
        progress(f"training on {job.tokens('train'):,} tokens, {job.tokens('heldout'):,} held out")
        schedule = Schedule(epochs, learning_rate, batch_size, seed=seed, bf16=bf16)
        histories["training"] = job.medusa1(
            trained, schedule, soft=soft, hidden_states=hidden_states, conversations=conversations
        )
    if recipe == "medusa2":
        progress("training heads and model")
        schedule = Schedule(joint_epochs, joint_learning_rate, conversations, seed=seed, bf16=bf16)
        lora = Lora(rank=lora_rank, dropout=lora_dropout, heads_weight=heads_weight, heads_rate=heads_rate)
        histories["joint"] = job.medusa2(trained, schedule, lora)
    if not processes.is_main:
        return
    progress("saving")
    job.save(trained, getattr(torch, DTYPES[save_dtype]))
    write_text(output / "training.json", json.dumps({"recipe": recipe, **histories}, indent=1) + "\n")
    for name, history in histories.items():
        plot_training(history, trained.config.num_heads, output / f"{name}.png")
    progress("done")
    last = held_out([*histories.values()][-1])[-1]
    Console().print(accuracy_table(last, trained.config.num_heads))
    if recipe == "medusa2":
        click.echo(quality_line(last, histories["joint"][-1]["merged_perplexity"]))


def _read(
    model: str,
    data: tuple[Path, ...],
    processes: Processes,
    heldout: float,
    limit: int | None,
    max_length: int,
    *,
    strict: bool,
) -> tuple[PreTrainedTokenizerBase, TokenizedData]:
    """Reads and tokenizes the data before the model is loaded, which takes much longer."""
    from medusa_export.training.dataset import load_sources
    from medusa_export.training.templates import load_chat_tokenizer

    sources = load_sources(data, heldout=heldout, limit=limit)
    with processes.main_first():
        tokenizer = load_chat_tokenizer(model)
    tokenized = sources.tokenized(tokenizer, max_length, strict=strict)
    if tokenized.note and processes.is_main:
        click.echo(tokenized.note, err=True)
    return tokenizer, tokenized


def _check_shape(context: click.Context, heads: str | None) -> None:
    """Refuses options that shape fresh heads where there are others, and they would be passed over without a word."""
    if heads is None:
        return
    default = click.core.ParameterSource.DEFAULT
    given = next((name for name in _SHAPE if context.get_parameter_source(name) is not default), None)
    if given is not None:
        option = "--conditioned and --plain" if given == "conditioned" else f"--{given.replace('_', '-')}"
        raise click.UsageError(f"Heads given with --heads have their shape: leave {option} out, or train fresh ones.")

"""``medusa-export distill``: have a model write the data that its heads are trained on."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.options import DTYPES, Progress, extra


@click.command("distill")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the data set.")
@click.option(
    "--prompts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Prompts to answer: .txt, or .json(l) with messages, conversations (ShareGPT), data (UltraChat) or prompt.",
)
@click.option(
    "--magpie",
    type=click.IntRange(0),
    help="Prompts that the model writes itself, from its chat template. [default: 1000 without --prompts]",
)
@click.option("--strict", is_flag=True, help="Refuse files with rows that can't be used, instead of skipping them.")
@click.option("--limit", type=click.IntRange(1), help="Conversations at most.")
@click.option("--turns", type=click.IntRange(1), default=1, show_default=True, help="User turns per conversation.")
@click.option("--system", help="A system message.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of an answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.3, show_default=True, help="Of answers; 0: greedy.")
@click.option("--prompt-temperature", type=click.FloatRange(0), default=1.0, show_default=True, help="Of own prompts.")
@click.option("--heldout", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Fraction set aside.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Conversations at a time.")
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the weights. [default: bf16 on a GPU, else fp32]")
@click.option("--device", help="Such as cuda:1. [default: the GPU, if there is one]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    model: str,
    output: Path,
    prompts: tuple[Path, ...],
    magpie: int | None,
    strict: bool,
    limit: int | None,
    turns: int,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    prompt_temperature: float,
    heldout: float,
    batch_size: int,
    seed: int,
    dtype: str | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Have MODEL write the data that its heads are trained on.

    It answers prompts from files, or such as it writes itself. Interrupted, the same command goes on where
    it stopped. OUTPUT/train.jsonl and OUTPUT/heldout.jsonl load with the datasets library.
    """
    progress = Progress(quiet=quiet)
    with extra("train"):
        import torch

        from medusa_export.models.checkpoints import load_model
        from medusa_export.training.device import device_of, dtype_of
        from medusa_export.training.distillation import DistillSettings, distill
        from medusa_export.training.generation import Writer
        from medusa_export.training.rows import check_skipped, facts, read_conversations, summary
        from medusa_export.training.templates import load_chat_tokenizer
        from medusa_runtime.bundles.listed_folder import FileFacts

    place = device_of(device)
    kind = dtype_of(dtype and DTYPES[dtype], place)
    readings = [read_conversations(path) for path in prompts]
    rows, skipped = sum(reading.rows for reading in readings), [row for reading in readings for row in reading.skipped]
    check_skipped(skipped, rows, strict=strict)
    if skipped:
        click.echo(f"note: {summary(skipped, rows)}", err=True)
    conversations = [conversation for reading in readings for conversation in reading.conversations]
    settings = DistillSettings(
        model=Path(model).name,
        prompts=[[path.name, FileFacts.of(path).sha256] for path in prompts],
        magpie=magpie if magpie is not None else 0 if prompts else 1000,
        limit=limit,
        turns=turns,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        prompt_temperature=prompt_temperature,
        heldout=heldout,
        batch_size=batch_size,
        seed=seed,
        dtype=kind,
    )

    def open_writer() -> Writer:
        progress(f"loading {model}")
        tokenizer = load_chat_tokenizer(model)
        base = load_model(model, dtype=getattr(torch, kind)).to(place)
        return Writer(base, tokenizer)

    found = facts(skipped, rows) if prompts else None
    made = distill(output, settings, conversations, open_writer, found=found, strict=strict, quiet=quiet)
    if made.own_prompts < settings.magpie:
        click.echo(
            f"note: of {settings.magpie:,} prompts the model wrote {made.own_prompts:,}, since it repeats itself or "
            "does not end its turns: raise --prompt-temperature, or give it a file with --prompts.",
            err=True,
        )
    if made.left_out:
        click.echo(
            f"note: {made.left_out:,} prompts are left out, as the model has no room for an answer of {max_new_tokens} "
            "tokens after them.",
            err=True,
        )
    if made.refused:
        total = len(made.refused) + made.answers + made.left_out
        click.echo(f"note: the chat template refuses some prompts: {summary(made.refused, total)}", err=True)
    if made.cut_off > made.answers // 2:
        click.echo(
            f"note: {made.cut_off:,} of {made.answers:,} conversations were cut off at {max_new_tokens} tokens of an "
            "answer: raise --max-new-tokens, in another folder, so that the heads see whole answers.",
            err=True,
        )
    for name, split in made.splits.items():
        click.echo(f"{output / name}.jsonl: {split.rows:,} conversations, {split.tokens:,} tokens written")

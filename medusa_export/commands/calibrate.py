"""``medusa-export calibrate``: measure how often heads are right."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.commands.options import DTYPES, Progress, extra


@click.command("calibrate")
@click.argument("model")
@click.option(
    "--heads", metavar="PATH", required=True, help="Heads in any published format: a file, a folder or a hub id."
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="What 'distill' wrote: its held-out part is used. Or a file of conversations: all of it is. May be repeated.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The JSON file to write.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also write a plot, as PNG.")
@click.option("--max-length", type=click.IntRange(3), default=2048, show_default=True, help="Tokens of a conversation.")
@click.option("--strict", is_flag=True, help="Refuse data with rows that can't be used, instead of skipping them.")
@click.option(
    "--lookup/--no-lookup", default=True, show_default=True, help="Count the runtime's guesses from the text, too."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the model. [default: bf16 on a GPU, else fp32]")
@click.option("--device", help="Such as cuda:1. [default: the GPU, if there is one]")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    model: str,
    heads: str,
    data: tuple[Path, ...],
    output: Path,
    plot: Path | None,
    max_length: int,
    strict: bool,
    lookup: bool,
    dtype: str | None,
    device: str | None,
    quiet: bool,
) -> None:
    """Measure how often the heads of MODEL are right, by head and rank, on text that they were not trained on.

    'medusa-export tree' searches the best tree by it, and 'medusa-export onnx --calibration' tells the runtime.
    """
    progress = Progress(quiet=quiet)
    with extra("train"):
        import tempfile

        import torch
        from rich.console import Console

        from medusa_export.heads.files import load_heads
        from medusa_export.models.checkpoints import load_model
        from medusa_export.plots import plot_calibration
        from medusa_export.training.calibrate import counted, depth_of
        from medusa_export.training.dataset import load_heldout
        from medusa_export.training.device import device_of, dtype_of
        from medusa_export.training.features import (
            FeatureKey,
            Features,
            batched,
            compute_features,
            digest_of_samples,
        )
        from medusa_export.training.report import calibration_table
        from medusa_export.training.templates import load_chat_tokenizer

    tokenized = load_heldout(data).tokenized(load_chat_tokenizer(model), max_length, strict=strict)
    if tokenized.note:
        click.echo(tokenized.note, err=True)
    progress(f"loading {model}")
    place = device_of(device)
    base = load_model(model, dtype=getattr(torch, dtype_of(dtype and DTYPES[dtype], place))).to(place)
    attached = load_heads(heads, base).float().to(place)
    depth = depth_of(attached, lookup=lookup)
    parts, texts = [], []
    for samples in tokenized.samples["heldout"]:
        key = FeatureKey.of(base, Path(model).name, digest_of_samples(samples), depth, max_length)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "features"
            otherwise = "set TMPDIR to a folder that has more, or give less data"
            found = compute_features(base, samples, folder, key, name="heldout", otherwise=otherwise, quiet=quiet)
            parts.append(found)
        texts += [sample for batch in batched(samples, max_length) for sample in batch]
    features = Features.join(parts)
    progress(f"running the heads over {len(features):,} positions")
    names = {"model": Path(model).name, "heads": Path(heads).name}
    calibration = counted(attached, base, features, texts, lookup=lookup, names=names)
    calibration.save(output)
    if plot is not None:
        plot_calibration(calibration, plot)
    progress("done")
    Console().print(calibration_table(calibration))

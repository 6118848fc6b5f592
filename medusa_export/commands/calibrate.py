"""``medusa-export calibrate``: measure how often heads are right."""

from __future__ import annotations

from pathlib import Path

import click

from medusa_export.cli import Progress, extra


@click.command("calibrate")
@click.argument("model")
@click.option("--heads", metavar="PATH", required=True, help="Heads in any published format.")
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
@click.option(
    "--lookup/--no-lookup", default=True, show_default=True, help="Count the runtime's guesses from the text, too."
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    model: str,
    heads: str,
    data: tuple[Path, ...],
    output: Path,
    plot: Path | None,
    max_length: int,
    lookup: bool,
    quiet: bool,
) -> None:
    """Measure how often the heads of MODEL are right, by head and rank, on text that they were not trained on.

    'medusa-export tree' searches the best tree by it, and 'medusa-export onnx --calibration' tells the runtime.
    """
    progress = Progress(quiet=quiet)
    with extra("train"):
        import tempfile
        from dataclasses import replace

        import numpy as np
        import torch
        from rich.console import Console

        from medusa_export.calibration import Calibration
        from medusa_export.checkpoints import load_model
        from medusa_export.head_files import load_heads
        from medusa_export.plots import plot_calibration
        from medusa_export.training.calibrate import below_heads, step_starts, target_places, text_guesses, with_guesses
        from medusa_export.training.conversations import load_chat_tokenizer
        from medusa_export.training.dataset import load_heldout
        from medusa_export.training.features import FeatureKey, Features, batched, compute_features
        from medusa_export.training.medusa1 import TOP
        from medusa_export.training.report import calibration_table
        from medusa_runtime.lookup import DEEPEST_GUESS

    splits = [load_heldout(source) for source in data]
    progress(f"loading {model}")
    tokenizer = load_chat_tokenizer(model)
    base = load_model(model, dtype=torch.float32)
    attached = load_heads(heads, base)
    num_heads = attached.config.num_heads
    depth = max(num_heads, DEEPEST_GUESS) if lookup else num_heads
    parts, texts = [], []
    for split in splits:
        key = FeatureKey.of(base, Path(model).name, split.sha256, depth, max_length)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "features"
            samples = split.samples(tokenizer)
            parts.append(compute_features(base, samples, folder, key, name=split.name, quiet=quiet))
        texts += [sample for batch in batched(samples, max_length) for sample in batch]
    features = Features.join(parts)
    progress(f"running the heads over {len(features):,} positions")
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    places = tried = target_places(attached, *layers, replace(features, targets=features.targets[:, :num_heads]))
    targets = features.targets.numpy()
    guesses = np.full(targets.shape, -1)
    if lookup:
        guesses = text_guesses(texts, depth).numpy()
        guessed = target_places(attached, *layers, replace(features, targets=torch.tensor(guesses[:, :num_heads])))
        tried = with_guesses(below_heads(places, targets), below_heads(guessed, guesses), guesses, targets)
    starts = step_starts(tried, features.left.numpy())
    calibration = Calibration.count(
        places,
        TOP[-1],
        steps=tried[starts],
        guessed=guesses[starts, 0] >= 0,
        model=Path(model).name,
        heads=Path(heads).name,
    )
    calibration.save(output)
    if plot is not None:
        plot_calibration(calibration, plot)
    progress("done")
    Console().print(calibration_table(calibration))

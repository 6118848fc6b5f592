"""Measures accuracy by amount of data: trains new heads on samples of a data set, measures all on the same answers.

Usage: python scripts/data_curve.py MODEL --data DATA --measure FILE -o FOLDER -- OPTIONS OF 'medusa-export train'
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
from matplotlib.figure import Figure

from medusa_export.common.files import atomic_file, write_text
from medusa_export.training.dataset import load_splits
from medusa_export.training.templates import load_chat_tokenizer
from medusa_export.trees.calibration import Calibration

TOP = (1, 5)


def medusa_export(*arguments: object) -> None:
    """Runs a command of medusa-export."""
    subprocess.run([sys.executable, "-m", "medusa_export", *map(str, arguments)], check=True)  # noqa: S603


def point(tokens: int, measured: Path) -> dict[str, float]:
    """A point of the curve: the number of training tokens, and the accuracies of each head."""
    heads = enumerate(Calibration.load(measured).accuracies, 1)
    return {"tokens": tokens} | {f"head{k}_top{top}": sum(head[:top]) for k, head in heads for top in TOP}


def plot(points: list[dict[str, float]], target: Path) -> None:
    """Draws a line per head, over tokens on a logarithmic scale."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens = [found["tokens"] for found in points]
    heads = sum(name.endswith("_top1") for name in points[0])
    for k in range(1, heads + 1):
        (line,) = axes.plot(tokens, [found[f"head{k}_top1"] for found in points], "o-", label=f"head {k}")
        axes.plot(tokens, [found[f"head{k}_top5"] for found in points], "o--", color=line.get_color())
    axes.set(xlabel="tokens trained on", ylabel="accuracy", xscale="log", ylim=0, title="Top-1 (solid), top-5 (dashed)")
    axes.legend()
    with atomic_file(target) as path:
        figure.savefig(path, dpi=110, format="png")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Data set, as for 'train'.")
@click.option("--measure", type=click.Path(path_type=Path), required=True, help="Conversations to measure on.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of heads, JSON and plot.")
@click.option("--heldout", default=0.05, show_default=True, help="Share of prompts to hold out, if --data is a file.")
@click.option("--parts", default=4, show_default=True, help="Number of points. Each has twice the data of the last.")
@click.option("--known", type=(int, str), multiple=True, metavar="TOKENS HEADS", help="Add heads that exist already.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    model: str,
    data: Path,
    measure: Path,
    output: Path,
    heldout: float,
    parts: int,
    known: tuple[tuple[int, str], ...],
    options: tuple[str, ...],
) -> None:
    """Trains heads, measures them and draws the curve. Existing results are kept."""
    tokenizer = load_chat_tokenizer(model)
    whole = load_splits(data, heldout=heldout)[0]
    points = []
    for part in reversed(range(parts)):
        split = whole.sample(len(whole.conversations) >> part)
        heads, measured = output / f"heads-{part}", output / f"calibration-{part}.json"
        if not measured.is_file():
            chosen = ("--data", data, "--heldout", heldout, "--limit", len(split.conversations))
            medusa_export("train", model, *chosen, "-o", heads, *options)
            medusa_export("calibrate", model, "--heads", heads, "--data", measure, "-o", measured)
        points.append(point(sum(sum(sample.is_label) for sample in split.labelled(tokenizer).samples), measured))
    for tokens, path in sorted(known):
        measured = output / f"calibration-{tokens}.json"
        if not measured.is_file():
            medusa_export("calibrate", model, "--heads", path, "--data", measure, "-o", measured)
        points.append(point(tokens, measured))
    write_text(output / "data_curve.json", json.dumps(points, indent=1) + "\n")
    plot(points, output / "data_curve.png")


if __name__ == "__main__":
    main()

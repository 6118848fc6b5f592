"""What a training came to: a table, JSON and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from medusa_export.calibration import Calibration
from medusa_export.files import atomic_file
from medusa_export.training.medusa1 import TOP


def accuracy_table(figures: dict[str, float], num_heads: int) -> Table:
    """Heads by line, top-n by column."""
    table = Table("head", *(f"top-{top}" for top in TOP), box=box.SIMPLE_HEAD, title="Accuracy on held-out prompts")
    for k in range(1, num_heads + 1):
        table.add_row(str(k), *(f"{figures[f'head{k}_top{top}']:.1%}" for top in TOP))
    return table


def held_out(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The evaluations of a training, in turn: ``epoch``, ``loss`` and the accuracies."""
    return [
        {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith(("eval_", "epoch"))}
        for entry in history
        if "eval_loss" in entry
    ]


def plot_training(history: Sequence[dict[str, Any]], num_heads: int, target: Path) -> None:
    """Losses and accuracies over epochs, as a PNG.

    Raises:
        OutputError: It can't be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  # of the extra for training, and slow to import

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, hits = figure.subplots(1, 2)
    steps = [entry for entry in history if "loss" in entry]
    losses.plot([entry["epoch"] for entry in steps], [entry["loss"] for entry in steps], label="training")
    points = held_out(history)
    epochs = [point["epoch"] for point in points]
    losses.plot(epochs, [point["loss"] for point in points], "o-", label="held out")
    losses.set(xlabel="epoch", ylabel="loss", title="Loss")
    losses.legend()
    for k in range(1, num_heads + 1):
        (line,) = hits.plot(epochs, [point[f"head{k}_top1"] for point in points], "o-", label=f"head {k}")
        hits.plot(epochs, [point[f"head{k}_top5"] for point in points], "--", color=line.get_color())
    hits.set(xlabel="epoch", ylabel="accuracy", title="Held out: top-1 (solid), top-5 (dashed)", ylim=(0, 1))
    hits.legend()
    with atomic_file(target) as path:
        figure.savefig(path, dpi=110, format="png")


def calibration_table(calibration: Calibration) -> Table:
    """Heads by line, cumulative accuracy by column."""
    figures = {f"head{k}_top{top}": sum(head[:top]) for k, head in enumerate(calibration.accuracies, 1) for top in TOP}
    return accuracy_table(figures, len(calibration.accuracies))


def plot_calibration(calibration: Calibration, target: Path) -> None:
    """Cumulative accuracy over the number of candidates, a line per head, as a PNG.

    Raises:
        OutputError: It can't be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  # of the extra for training, and slow to import

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for k, head in enumerate(calibration.accuracies, 1):
        total = [sum(head[:top]) for top in range(1, len(head) + 1)]
        axes.plot(range(1, len(head) + 1), total, "o-", label=f"head {k}")
    title = f"{calibration.positions:,} held-out positions"
    axes.set(xlabel="candidates", ylabel="chance that one is right", title=title, ylim=(0, 1))
    axes.legend()
    with atomic_file(target) as path:
        figure.savefig(path, dpi=110, format="png")

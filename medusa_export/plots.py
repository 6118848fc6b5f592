"""Plots as PNG files.

Only the extra ``train`` installs matplotlib, so import this module only to draw a plot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from medusa_export.benchmarks.speeds import Speed
from medusa_export.common.files import atomic_file
from medusa_export.evaluation.quality import Quality
from medusa_export.training.report import held_out
from medusa_export.trees.calibration import Calibration

# Smaller divergences are rounding of fp32. A logarithmic axis shows them as this.
_LEAST_DIVERGENCE = 1e-6


def plot_sizes(sizes: Mapping[int, Speed], auto: Speed, target: Path) -> None:
    """Plots speedup, tokens per step and overhead over the tree size. Stars show ``auto``.

    Args:
        sizes: The speed at each tree size, by its number of nodes.
        auto: The speed with the tree size that the engine chooses.
        target: The PNG file to write.

    Raises:
        OutputError: The file can't be written.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    places = sorted(sizes)
    for label, name in (("speedup", "speedup"), ("tokens per step", "tokens_per_step"), ("overhead", "overhead")):
        (line,) = axes.plot(places, [getattr(sizes[size], name) for size in places], "o-", label=label)
        axes.plot([auto.nodes_per_step], [getattr(auto, name)], "*", color=line.get_color(), markersize=14)
    axes.plot([], [], "*", color="grey", markersize=12, label="auto")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xlabel="tree size (nodes)", ylabel="against tree size 1", title="Decoding with a tree")
    axes.legend()
    _save(figure, target)


def plot_training(history: Sequence[dict[str, Any]], num_heads: int, target: Path) -> None:
    """Plots losses and accuracies over epochs.

    Args:
        history: The log of a training.
        num_heads: Number of heads.
        target: The PNG file to write.

    Raises:
        OutputError: The file can't be written.
    """
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
    _save(figure, target)


def plot_calibration(calibration: Calibration, target: Path) -> None:
    """Plots the cumulative accuracy over the number of candidates, a line per head.

    Args:
        calibration: The measured hit rates.
        target: The PNG file to write.

    Raises:
        OutputError: The file can't be written.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for k, head in enumerate(calibration.accuracies, 1):
        total = [sum(head[:top]) for top in range(1, len(head) + 1)]
        axes.plot(range(1, len(head) + 1), total, "o-", label=f"head {k}")
    title = f"{calibration.positions:,} held-out positions"
    axes.set(xlabel="candidates", ylabel="chance that one is right", title=title, ylim=(0, 1))
    axes.legend()
    _save(figure, target)


def plot_quality(quality: Quality, target: Path) -> None:
    """Plots KL divergence and perplexity of bundles over the size of their weights.

    Args:
        quality: The measured quality.
        target: The PNG file to write.

    Raises:
        OutputError: The file can't be written.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    divergence, perplexity = figure.subplots(1, 2)
    for bundle in quality.bundles:
        close, size = bundle.closeness, [bundle.megabytes]
        divergence.plot(size, [max(close.divergence, _LEAST_DIVERGENCE)], "o", label=bundle.name)
        excess, error = 100 * (close.perplexity_ratio - 1), 100 * close.perplexity_error
        perplexity.errorbar(size, [excess], [error], fmt="o", capsize=3, label=bundle.name)
    title = f"{quality.bundles[0].closeness.tokens:,} tokens of {quality.texts:,} texts"
    divergence.set(xlabel="weights (MB)", ylabel="KL divergence (nats)", yscale="log", title=title)
    perplexity.set(xlabel="weights (MB)", ylabel="perplexity above the model's (%)", title=f"Against {quality.model}")
    perplexity.axhline(0.0, color="grey", linewidth=0.8)
    perplexity.legend()
    _save(figure, target)


def _save(figure: Figure, target: Path) -> None:
    with atomic_file(target) as path:
        figure.savefig(path, dpi=110, format="png")

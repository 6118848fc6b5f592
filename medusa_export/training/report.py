"""What a training came to: a table, JSON and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from medusa_export.training.medusa1 import TOP
from medusa_export.trees.calibration import Calibration


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


def quality_line(figures: dict[str, float], merged_perplexity: float) -> str:
    """What became of the base model."""
    return (
        f"Perplexity of the held-out answers: {figures['perplexity_before']:.4f} before, {figures['perplexity']:.4f} "
        f"after, {merged_perplexity:.4f} with LoRA merged into the weights. The model still makes the same choice at "
        f"{figures['same_choice']:.1%} of positions (KL divergence {figures['kl']:.4f})."
    )


def calibration_table(calibration: Calibration) -> Table:
    """Heads by line, cumulative accuracy by column."""
    figures = {f"head{k}_top{top}": sum(head[:top]) for k, head in enumerate(calibration.accuracies, 1) for top in TOP}
    return accuracy_table(figures, len(calibration.accuracies))

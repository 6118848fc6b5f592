"""Tables and sentences about the result of a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from medusa_export.training.medusa1 import TOP
from medusa_export.trees.calibration import Calibration


def accuracy_table(figures: dict[str, float], num_heads: int) -> Table:
    """A table of accuracies: a row per head, a column per top-n.

    Args:
        figures: Accuracies by name, such as ``head1_top3``.
        num_heads: Number of heads.
    """
    table = Table("head", *(f"top-{top}" for top in TOP), box=box.SIMPLE_HEAD, title="Accuracy on held-out prompts")
    for k in range(1, num_heads + 1):
        table.add_row(str(k), *(f"{figures[f'head{k}_top{top}']:.1%}" for top in TOP))
    return table


def held_out(history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The evaluations of a training, in order: ``epoch``, ``loss`` and the accuracies of each."""
    return [
        {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith(("eval_", "epoch"))}
        for entry in history
        if "eval_loss" in entry
    ]


def quality_line(figures: dict[str, float], merged_perplexity: float) -> str:
    """A sentence about the base model's quality after a training with LoRA.

    Args:
        figures: The last evaluation.
        merged_perplexity: Perplexity of the held-out answers with LoRA merged into the weights.
    """
    return (
        f"Perplexity of the held-out answers: {figures['perplexity_before']:.4f} before, {figures['perplexity']:.4f} "
        f"after, {merged_perplexity:.4f} with LoRA merged into the weights. The model still chooses the same token at "
        f"{figures['same_choice']:.1%} of positions (KL divergence {figures['kl']:.4f})."
    )


def calibration_table(calibration: Calibration) -> Table:
    """A table of a calibration: a row per head, a column per top-n, which is cumulative."""
    figures = {f"head{k}_top{top}": sum(head[:top]) for k, head in enumerate(calibration.accuracies, 1) for top in TOP}
    return accuracy_table(figures, len(calibration.accuracies))

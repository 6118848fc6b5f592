"""The quality of bundles as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from medusa_export.evaluation.quality import HeadQuality, Quality


def closeness_table(quality: Quality) -> Table:
    """A table of the logits: a row per bundle."""
    tokens = max(bundle.closeness.tokens for bundle in quality.bundles)
    title = f"Against {quality.model}, on {tokens:,} tokens of {quality.texts:,} texts"
    columns = ("bundle", "bits", "MB", "perplexity", "ratio", "KL", "same choice")
    table = _table(title, "Logits of each bundle's own graph, in ONNX Runtime on the CPU", columns)
    for bundle in quality.bundles:
        close = bundle.closeness
        table.add_row(
            bundle.name,
            f"{bundle.bits:.3g}",
            f"{bundle.megabytes:,.0f}",
            f"{close.perplexity:.4g}",
            f"{close.perplexity_ratio:.4f} ± {close.perplexity_error:.4f}",
            f"{close.divergence:.4f}",
            f"{close.same_choice:.1%}",
        )
    return table


def heads_table(quality: Quality) -> Table | None:
    """A table of the heads: their accuracy, and expected tokens per step. None if no heads were measured."""
    rows = list(_heads(quality))
    if not rows:
        return None
    num_heads = max(len(heads.accuracies) for _, heads in rows)
    columns = [f"head {k}\ntop-1, 5 (%)" for k in range(1, num_heads + 1)]
    caption = "Heads in PyTorch, with each bundle's matrices of integers"
    table = _table("Heads on the same texts", caption, ("", *columns, "tokens/step"))
    for name, heads in rows:
        accuracies = [f"{100 * head[0]:.1f}, {100 * sum(head[:5]):.1f}" for head in heads.accuracies]
        table.add_row(name, *accuracies, *[""] * (num_heads - len(accuracies)), f"{heads.tokens_per_step:.2f}")
    return table


def _table(title: str, caption: str, columns: Sequence[str]) -> Table:
    """An empty table that fits a narrow terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title, caption=caption)
    for column in columns:
        table.add_column(column.replace("same ", "same\n").replace("tokens/", "tokens\n/"), no_wrap=True)
    return table


def _heads(quality: Quality) -> Iterator[tuple[str, HeadQuality]]:
    """Yields the name and the heads of each row."""
    shown: HeadQuality | None = None
    for bundle in quality.bundles:
        if bundle.heads is None or bundle.heads_before is None:
            continue
        if bundle.heads_before != shown:  # bundles may have other trees
            shown = bundle.heads_before
            yield "unquantized", shown
        yield bundle.name, bundle.heads

"""The quality of bundles as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from medusa_export.evaluation.quality import HeadQuality, Quality


def closeness_table(quality: Quality) -> Table:
    """A table of the logits: a row per bundle."""
    tokens = max(bundle.closeness.tokens for bundle in quality.bundles)
    title = f"Against {quality.model}, on {tokens:,} tokens of {quality.texts:,} texts"
    table = Table("bundle", "bits", "MB", "perplexity", "ratio", "KL", "same choice", box=box.SIMPLE_HEAD, title=title)
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
    columns = [f"head {k} top-1, top-5" for k in range(1, num_heads + 1)]
    table = Table("", *columns, "tokens/step", box=box.SIMPLE_HEAD, title="Heads on the same texts")
    for name, heads in rows:
        accuracies = [f"{head[0]:.1%}, {sum(head[:5]):.1%}" for head in heads.accuracies]
        table.add_row(name, *accuracies, *[""] * (num_heads - len(accuracies)), f"{heads.tokens_per_step:.2f}")
    return table


def _heads(quality: Quality) -> Iterator[tuple[str, HeadQuality]]:
    """Yields the name and the heads of each row."""
    shown: HeadQuality | None = None
    for bundle in quality.bundles:
        if bundle.heads is None or bundle.heads_before is None:
            continue
        if bundle.heads_before != shown:  # bundles may have other trees
            shown = bundle.heads_before
            yield f"{quality.model}, unquantized", shown
        yield bundle.name, bundle.heads

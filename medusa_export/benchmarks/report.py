"""A bench as a table and as Markdown, and its comparison with an earlier one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from medusa_export.benchmarks.speeds import Speed
from medusa_export.common.errors import DatasetError

COLUMNS = (
    "", "tokens/s", "range", "tokens per step", "nodes per step", "over- head", "speedup", "first token", "memory",
    "same tokens", "weights",
)  # fmt: skip
# Not shown at a terminal, which is narrow.
_WIDE = {"range", "nodes per step", "weights"}


def rows(measured: Mapping[str, Speed]) -> list[tuple[str, ...]]:
    """Returns the cells of the table, a row per contestant."""
    return [
        (
            name,
            f"{speed.tokens_per_second:.1f}",
            f"{speed.spread[0]:.1f} to {speed.spread[1]:.1f}",
            f"{speed.tokens_per_step:.2f}",
            f"{speed.nodes_per_step:.3g}",
            f"{speed.overhead:.2f}",
            f"{speed.speedup:.2f}x",
            f"{speed.first_token_seconds * 1e3:.0f} ms",
            "" if speed.memory_mib is None else f"{speed.memory_mib} MiB",
            "yes" if speed.identical else "NO" if speed.comparable else "no",
            str(speed.weights or ""),
        )
        for name, speed in measured.items()
    ]


def as_table(measured: Mapping[str, Speed]) -> Table:
    """Returns a table for a terminal."""
    shown = [column not in _WIDE for column in COLUMNS]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in compress(COLUMNS, shown):
        table.add_column(column.replace(" ", "\n"), no_wrap=column != COLUMNS[0])  # long names take two lines
    for row in rows(measured):
        table.add_row(*compress(row, shown))
    return table


def own_weights(measured: Mapping[str, Speed]) -> list[str]:
    """Returns a sentence for each contestant whose weights are not the bundle's."""
    return [
        f"{name} has weights of its own ({speed.weights.kind}), so its tokens may differ."
        for name, speed in measured.items()
        if speed.weights is not None and not speed.comparable
    ]


def as_markdown(measured: Mapping[str, Speed], categories: Mapping[str, Mapping[str, float]]) -> str:
    """Returns tables in Markdown: contestants, and speed by category."""
    lines = [f"| {' | '.join(column.replace('- ', '') for column in COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(row)} |" for row in rows(measured)]
    if categories:
        lines += ["", "| category | tokens/step | speedup |", "|---|---|---|"]
        lines += [f"| {name} | {f['tokens_per_step']:.2f} | {f['speedup']:.2f}x |" for name, f in categories.items()]
    return "\n".join(lines) + "\n"


# Figures to compare with an earlier report. They are ratios, because another machine has other tokens per second.
_RATIOS = ("speedup", "tokens_per_step", "overhead")


def earlier_report(file: Path) -> dict[str, float]:
    """Reads the figures of an earlier report that ``regressions`` compares.

    Args:
        file: A JSON report of ``medusa-export bench``.

    Raises:
        DatasetError: The file can't be read, or is no such report.
    """
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        ratios = {name: float(old[name]) for name in _RATIOS}
        if not all(map(math.isfinite, ratios.values())):
            raise ValueError("a figure is not finite")
        return ratios | {"identical": bool(old["identical"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{file} is no report of 'medusa-export bench' ({error!r}).") from error


def regressions(new: Mapping[str, Any], old: Mapping[str, float], tolerance: float) -> list[str]:
    """Returns a sentence for each figure that is worse than in an earlier report.

    Args:
        new: Figures of a bench.
        old: Figures of the earlier report.
        tolerance: Share by which a ratio may be worse.
    """
    found = []
    for name in _RATIOS:
        value = old[name]
        holds = new[name] <= value * (1 + tolerance) if name == "overhead" else new[name] >= value * (1 - tolerance)
        if not holds:  # NaN never holds
            found.append(f"{name.replace('_', ' ')} is {new[name]:.2f}, was {value:.2f}")
    if old["identical"] and not new["identical"]:
        found.append("the tokens are no longer the same")
    return found

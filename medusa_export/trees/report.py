"""A searched tree as a table."""

from __future__ import annotations

from rich import box
from rich.table import Table

from medusa_export.trees.timing import TreeTimes
from medusa_runtime.bundles.facts import Acceptance
from medusa_runtime.decoding.latency import candidate_sizes


def tree_table(acceptance: Acceptance, times: TreeTimes | None = None) -> Table:
    """Returns expected tokens per step by number of nodes, and the speed where step times are known.

    Args:
        acceptance: The acceptance estimates of the tree's nodes.
        times: Step times of its sizes; None if they were not measured.
    """
    seconds = times.seconds if times is not None else {}
    kinds = {"": None} if not acceptance.hit_values else {"": None, "\nwith a lookup hit": True, "\nwithout": False}
    table = Table("nodes", *(f"expected tokens/step{kind}" for kind in kinds), box=box.SIMPLE_HEAD)
    for header in ("ms/step", "expected tokens/s") if seconds else ():
        table.add_column(header)
    for size in sorted({*candidate_sizes(len(acceptance.node_values)), *seconds}):
        tokens = acceptance.expected_tokens(size)
        cells = [str(size)]
        for hit in kinds.values():
            expected = tokens if hit is None else sum(acceptance.values(hit=hit)[:size])
            cells.append(f"{expected:.2f}")
        if size in seconds:
            cells += [f"{seconds[size] * 1e3:.1f}", f"{tokens / seconds[size]:.1f}"]
        table.add_row(*cells)
    return table

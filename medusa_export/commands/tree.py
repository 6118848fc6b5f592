"""``medusa-export tree``: search the best draft tree for calibrated heads."""

from __future__ import annotations

import json
from pathlib import Path

import click

from medusa_export.commands.options import Progress, extra


@click.command("tree")
@click.argument("calibration", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the tree here, for 'onnx --tree'.")
@click.option("--size", type=click.IntRange(1), default=64, show_default=True, help="Nodes, the root included.")
@click.option(
    "--measure",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Time steps of this bundle on this machine, and tell which size is fastest.",
)
@click.option("--draw", is_flag=True, help="Draw the tree.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(calibration: Path, output: Path | None, size: int, measure: Path | None, draw: bool, quiet: bool) -> None:
    """Search the tree that accepts most tokens per step, by what 'medusa-export calibrate' measured.

    Its nodes come in the order of their gain, so that every prefix is the best tree of its size. Where guesses from the
    text were counted, the first four are the best for steps that have none.
    """
    progress = Progress(quiet=quiet)
    with extra("export"):
        from rich import box
        from rich.console import Console
        from rich.table import Table

        from medusa_export.common.files import write_text
        from medusa_export.trees.calibration import Calibration
        from medusa_export.trees.search import search_tree
        from medusa_runtime.decoding.latency import LatencyTable, candidate_sizes
        from medusa_runtime.decoding.tree_choice import TreeChoice
        from medusa_runtime.engine import MedusaEngine

    measured = Calibration.load(calibration)
    tree = search_tree(measured, size)
    if tree.size < size:
        click.echo(
            f"note: {tree.size} nodes, not {size}: no other candidate was ever right when the heads were calibrated.",
            err=True,
        )
    expected = measured.acceptance(tree)
    sizes = candidate_sizes(tree.size)
    seconds: dict[int, float] = {}
    if measure is not None:
        progress(f"timing steps of {measure}")
        with MedusaEngine.load(measure) as engine:
            seconds = LatencyTable.measured(engine.bundle, engine.backend).seconds
            sizes = sorted({*sizes, *(s for s in seconds if s <= tree.size)})
    console = Console()
    kinds = {"": None} if not expected.hit_values else {"": None, "\nwith a lookup hit": True, "\nwithout": False}
    table = Table("nodes", *(f"expected tokens/step{kind}" for kind in kinds), box=box.SIMPLE_HEAD)
    for header in ("ms/step", "expected tokens/s") if seconds else ():
        table.add_column(header)
    for nodes in sizes:
        tokens = expected.expected_tokens(nodes)
        cells = [str(nodes)]
        for hit in kinds.values():
            tokens_of = tokens if hit is None else sum(expected.values(hit=hit)[:nodes])
            cells.append(f"{tokens_of:.2f}")
        if nodes in seconds:
            cells += [f"{seconds[nodes] * 1e3:.1f}", f"{tokens / seconds[nodes]:.1f}"]
        table.add_row(*cells)
    console.print(table)
    if expected.hit_values:
        console.print(f"{expected.hit_share:.0%} of steps have a lookup hit.")
    if seconds:
        usable = LatencyTable({nodes: taken for nodes, taken in seconds.items() if nodes <= tree.size})
        without, with_hit = TreeChoice(expected, tree, {1: usable}).sizes[1]
        also = f", {with_hit} in steps that have a lookup hit" if expected.hit_values else ""
        console.print(f"Fastest on this machine: {without} nodes{also}.")
    if draw:
        console.print(tree.draw(), highlight=False)
    if output is not None:
        write_text(output, json.dumps([list(path) for path in tree.paths]) + "\n")
    progress("done")

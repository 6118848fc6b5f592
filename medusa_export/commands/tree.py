"""``medusa-export tree``: search the best draft tree for calibrated heads."""

from __future__ import annotations

import json
from pathlib import Path

import click

from medusa_export.commands.command import Command
from medusa_export.commands.options import COUNT, PATH, option_with_default, quiet_option
from medusa_export.commands.progress import shown_progress
from medusa_export.common import defaults
from medusa_export.common.extras import extra
from medusa_export.common.progress import Progress


@click.command("tree", cls=Command)
@click.argument("calibration", type=PATH)
@click.option("-o", "--output", type=PATH, help="Write the tree to this file, for 'onnx --tree'.")
@option_with_default(
    "--size", kind=COUNT, default=defaults.TREE_SIZE, text="Largest number of nodes, the root included."
)
@click.option(
    "--measure",
    type=PATH,
    metavar="BUNDLE",
    help="Time steps of this bundle on this machine, and show which size is fastest.",
)
@click.option("--draw", is_flag=True, help="Draw the tree.")
@quiet_option
def command(calibration: Path, output: Path | None, size: int, measure: Path | None, draw: bool, quiet: bool) -> None:
    """Search the tree that accepts most tokens per step, by the hit rates that 'medusa-export calibrate' measured.

    Its nodes are in the order of their gain, so every prefix is the best tree of its size. If lookup hits were counted,
    the first four nodes are the best for steps without a hit.
    """
    with shown_progress(quiet=quiet) as on_progress:
        with extra("export"):
            from rich.console import Console

            from medusa_export import Calibration, search_tree
            from medusa_export.common.files import write_text
            from medusa_export.trees.report import tree_table
            from medusa_export.trees.timing import time_tree

        measured = Calibration.load(calibration)
        tree = search_tree(measured, size)
        expected = measured.acceptance(tree)
        times = None
        if measure is not None:
            on_progress(Progress(f"timing steps of {measure}"))
            times = time_tree(measure, tree, expected)
        if output is not None:
            write_text(output, json.dumps([list(path) for path in tree.paths]) + "\n")
    if tree.size < size:
        click.echo(
            f"note: {tree.size} nodes, not {size}: no other candidate was ever right when the heads were calibrated.",
            err=True,
        )
    console = Console()
    console.print(tree_table(expected, times))
    if expected.hit_values:
        console.print(f"{expected.hit_share:.0%} of steps have a lookup hit.")
    if times is not None:
        also = f", {times.fastest_with_hit} in steps with a lookup hit" if expected.hit_values else ""
        console.print(f"Fastest on this machine: {times.fastest} nodes{also}.")
    if draw:
        console.print(tree.draw(), highlight=False)

"""Times the steps of a bundle on this machine, and finds the fastest sizes of a tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from medusa_runtime.bundles.facts import Acceptance
from medusa_runtime.bundles.tree import Tree
from medusa_runtime.decoding.latency import LatencyTable
from medusa_runtime.decoding.tree_choice import TreeChoice
from medusa_runtime.engine import MedusaEngine


@dataclass(frozen=True)
class TreeTimes:
    """Step times of a tree's sizes on this machine, and its fastest sizes.

    Attributes:
        seconds: Time of a step in seconds, by its number of nodes.
        fastest: The fastest size in steps without a lookup hit, in nodes.
        fastest_with_hit: The fastest size in steps with a lookup hit, in nodes.
    """

    seconds: Mapping[int, float]
    fastest: int
    fastest_with_hit: int


def time_tree(bundle: str | PathLike[str], tree: Tree, acceptance: Acceptance) -> TreeTimes:
    """Times steps of a bundle, and finds the sizes of a tree that emit most tokens per second.

    Args:
        bundle: The folder of a bundle of the same model. Its tree may be another one.
        tree: The tree.
        acceptance: The acceptance estimates of the tree's nodes.

    Raises:
        BundleError: The bundle can't be read.
        BackendError: The bundle can't be run.
    """
    with MedusaEngine.load(Path(bundle)) as engine:
        measured = LatencyTable.measured(engine.bundle, engine.backend).seconds
    seconds = {size: taken for size, taken in measured.items() if size <= tree.size}
    without, with_hit = TreeChoice(acceptance, tree, {1: LatencyTable(seconds)}).sizes[1]
    return TreeTimes(seconds, without, with_hit)

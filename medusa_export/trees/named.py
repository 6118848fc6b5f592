"""Draft trees: by name, from a file, or the default."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from medusa_export.common import defaults
from medusa_export.trees.calibration import Calibration
from medusa_export.trees.search import search_tree
from medusa_runtime.bundles.json_file import parse_json
from medusa_runtime.bundles.listed_folder import read_file
from medusa_runtime.bundles.tree import RankPath, Tree
from medusa_runtime.errors import TreeError

MAX_TREE_BYTES = 2**22
TREE_REMEDY = "A tree is a list of rank paths such as [[0], [0, 0], [1]]."
_DEFAULT = "mc_sim_7b_63"


@dataclass(frozen=True)
class NamedTree:
    """A tree and its name."""

    name: str
    tree: Tree


def reference_trees() -> list[str]:
    """Names of the trees that come with MEDUSA's reference implementation."""
    return sorted(entry.name.removesuffix(".json") for entry in (files("medusa_export") / "data" / "trees").iterdir())


def load_tree(
    spec: str, *, num_heads: int, top_k: int, calibration: Calibration | None = None, size: int = defaults.TREE_SIZE
) -> NamedTree:
    """Loads a tree for a number of heads.

    Args:
        spec: The name of a reference tree, a JSON file of rank paths, or ``default``. With a calibration, the default
            is the best tree for these heads. Otherwise it is MEDUSA's general tree, without the nodes that are too
            deep for the heads or use ranks that they don't have.
        num_heads: The number of heads: the greatest depth of a node.
        top_k: The number of candidates per head: ranks are smaller.
        calibration: Measured frequencies of the heads; None if they were not measured.
        size: The most nodes of the best tree.

    Raises:
        TreeError: There is no such tree, or one of its paths can't be used with these heads.
    """
    if spec == defaults.TREE and calibration is not None:
        found = search_tree(calibration, size)
        return NamedTree("calibrated", Tree.from_paths(found.paths, max_depth=num_heads, top_k=top_k))
    if spec == defaults.TREE:
        paths = [path for path in _reference(_DEFAULT) if len(path) <= num_heads and max(path) < top_k]
        return NamedTree(defaults.TREE, Tree.from_paths(paths))
    names = reference_trees()
    if spec in names:
        return NamedTree(spec, Tree.from_paths(_reference(spec), max_depth=num_heads, top_k=top_k))
    path = Path(spec)
    if not path.is_file():
        raise TreeError(
            f"There is no tree {spec!r}: give {defaults.TREE!r}, a JSON file, or one of {', '.join(names)}."
        )
    data = read_file(path, at_most=MAX_TREE_BYTES, error=TreeError)
    paths = parse_json(data, list[RankPath], path, remedy=TREE_REMEDY, error=TreeError)
    return NamedTree(path.stem, Tree.from_paths(paths, max_depth=num_heads, top_k=top_k))


def _reference(name: str) -> list[RankPath]:
    text = (files("medusa_export") / "data" / "trees" / f"{name}.json").read_text(encoding="utf-8")
    return [tuple(path) for path in json.loads(text)]

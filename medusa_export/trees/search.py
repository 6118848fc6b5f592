"""The best tree of each size for calibrated heads (MEDUSA, section 2.3.3)."""

from __future__ import annotations

import heapq
from os import PathLike
from pathlib import Path

from medusa_export.common import defaults
from medusa_export.trees.calibration import Calibration
from medusa_runtime.bundles.tree import RankPath, Tree

# The first nodes of a tree are chosen for steps without a lookup hit. Most steps have none, and a large tree costs
# them more time than it saves.
WITHOUT_HIT = 4


def search_tree(calibration: str | PathLike[str] | Calibration, size: int = defaults.TREE_SIZE) -> Tree:
    """Searches the tree with the most expected tokens per step; every prefix of it is the best tree of its size.

    The search adds the node that is most likely to be accepted until the tree is full. This greedy choice is optimal:
    a node is at most as likely as its parent, so no later node can be better than those that can be added now. (Paths
    that were counted only a few times may violate this by chance.) If lookup hits were counted, the first
    ``WITHOUT_HIT`` nodes are the best for steps without a hit, and later nodes are the best for the average over all
    steps.

    Args:
        calibration: Measured hit rates of the heads by ``calibrate``, or the file that holds them.
        size: The most nodes, the root included. A node that was never right is not added.

    Returns:
        The tree, its nodes in the order in which they were added.

    Raises:
        DatasetError: The file can't be read.
    """
    if not isinstance(calibration, Calibration):
        calibration = Calibration.load(Path(calibration))
    first = _grown((), size if not calibration.hit_paths else min(size, WITHOUT_HIT), calibration, hit=False)
    return Tree(_grown(first, size, calibration, hit=None))


def _grown(
    paths: tuple[RankPath, ...], size: int, calibration: Calibration, *, hit: bool | None
) -> tuple[RankPath, ...]:
    """The paths of a tree to which the most likely nodes were added, until it has ``size`` nodes with the root.

    ``hit`` chooses the kind of steps, as in ``Calibration.value``.
    """
    nodes = list(paths)
    # Of equally likely nodes the shallower one comes first, then the one of lower rank.
    reach: list[tuple[float, int, RankPath]] = []

    def open_children(path: RankPath) -> None:
        if len(path) < len(calibration.accuracies):
            ranks = calibration.top_k
        else:  # below the heads, lookup hits extend only the path of best candidates, as deep as they were counted
            ranks = int(not any(path) and len(path) < calibration.max_depth)
        for rank in range(ranks):
            child = (*path, rank)
            value = calibration.value(child, hit=hit)
            if value > 0 and child not in paths:
                heapq.heappush(reach, (-value, len(child), child))

    for path in ((), *paths):
        open_children(path)
    while reach and len(nodes) + 1 < size:
        _, _, path = heapq.heappop(reach)
        nodes.append(path)
        open_children(path)
    return tuple(nodes)

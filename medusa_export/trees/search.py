"""The best tree of each size for calibrated heads (MEDUSA, section 2.3.3)."""

from __future__ import annotations

import heapq

from medusa_export.trees.calibration import Calibration
from medusa_runtime.bundles.tree import RankPath, Tree

# The first nodes of a tree are those for steps that have no guess from the text: most have none, and for them a large
# tree doesn't pay.
UNGUESSED = 4


def search_tree(calibration: Calibration, size: int) -> Tree:
    """Adds the node that is most likely to be accepted, again and again: every prefix is the best of its size.

    A node is no more likely than its parent, but by chance where paths were hardly ever counted, so no node that is
    still out of reach can be better than those in reach. Where guesses from the text were counted, prefixes up to
    ``UNGUESSED`` nodes are the best for steps without one, and what is added to them the best for steps of both kinds.

    Args:
        calibration: How likely nodes are.
        size: Nodes, the root included, at most; a node that was never right is not added.
    """
    first = _grown((), size if not calibration.guessed else min(size, UNGUESSED), calibration, guessed=False)
    return Tree(_grown(first, size, calibration, guessed=None))


def _grown(
    paths: tuple[RankPath, ...], size: int, calibration: Calibration, *, guessed: bool | None
) -> tuple[RankPath, ...]:
    """Adds nodes to those that are there, the most likely ones for steps of a kind first."""
    nodes = list(paths)
    # Among equals the shallower node comes first, then the lower rank.
    reach: list[tuple[float, int, RankPath]] = []

    def open_children(path: RankPath) -> None:
        if len(path) < len(calibration.accuracies):
            ranks = calibration.top_k
        else:  # below the heads only the path of best candidates goes on, and no further than guesses were counted
            ranks = int(not any(path) and len(path) < calibration.max_depth)
        for rank in range(ranks):
            child = (*path, rank)
            value = calibration.value(child, guessed=guessed)
            if value > 0 and child not in paths:
                heapq.heappush(reach, (-value, len(child), child))

    for path in ((), *paths):
        open_children(path)
    while reach and len(nodes) + 1 < size:
        _, _, path = heapq.heappop(reach)
        nodes.append(path)
        open_children(path)
    return tuple(nodes)

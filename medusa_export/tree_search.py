"""The best tree of each size for calibrated heads (MEDUSA, section 2.3.3)."""

from __future__ import annotations

import heapq

from medusa_export.calibration import Calibration
from medusa_runtime.tree import RankPath, Tree


def search_tree(calibration: Calibration, size: int) -> Tree:
    """Adds the node that is most likely to be accepted, again and again: every prefix is the best of its size.

    A node is never more likely than its parent, so no node that is still out of reach can be better than
    those in reach.

    Args:
        calibration: How likely nodes are.
        size: Nodes, the root included, at most; a node that was never right is not added.
    """
    paths: list[RankPath] = []
    # Among equals the shallower node comes first, then the lower rank.
    reach: list[tuple[float, int, RankPath]] = []

    def open_children(path: RankPath) -> None:
        if len(path) < len(calibration.accuracies):
            for rank in range(calibration.top_k):
                child = (*path, rank)
                value = calibration.value(child)
                if value > 0:
                    heapq.heappush(reach, (-value, len(child), child))

    open_children(())
    while reach and len(paths) + 1 < size:
        _, _, path = heapq.heappop(reach)
        paths.append(path)
        open_children(path)
    return Tree(tuple(paths))

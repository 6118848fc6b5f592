"""Acceptance estimates for heads that were not calibrated.

The figures are those of the heads of Vicuna-7B (Medusa-1). They serve to choose a first tree size, and the bundle
marks them as ``prior``. A calibration replaces them.
"""

from __future__ import annotations

from medusa_runtime.bundles.facts import Acceptance
from medusa_runtime.bundles.tree import RankPath, Tree

TOP_1 = (0.560, 0.316, 0.201, 0.147, 0.118)
TOP_5 = (0.780, 0.563, 0.417, 0.340, 0.300)
# Each further rank is right 0.6 times as often as the one before.
RANK_DECAY = 0.6
# Each head beyond the measured five is right 0.8 times as often as the one before.
DEPTH_DECAY = 0.8


def rank_accuracy(head: int, rank: int) -> float:
    """The probability that candidate ``rank`` (from 0) of head ``head`` (from 0) is right."""
    measured = min(head, len(TOP_1) - 1)
    scale = DEPTH_DECAY ** (head - measured)
    if rank == 0:
        return scale * TOP_1[measured]
    # Ranks 1 to 4 share the difference between top-5 and top-1 as a geometric series. Later ranks continue the series.
    second = (TOP_5[measured] - TOP_1[measured]) * (1 - RANK_DECAY) / (1 - RANK_DECAY**4)
    return scale * second * RANK_DECAY ** (rank - 1)


def prior_acceptance(tree: Tree, *, trained: bool) -> Acceptance:
    """The acceptance estimates of a tree's nodes, before a calibration.

    Args:
        tree: The tree.
        trained: True if the heads are trained. If they are, a node's estimate is the product of the accuracies along
            its path; otherwise it is 0.
    """
    if not trained:
        return Acceptance("untrained", (1.0, *(0.0 for _ in tree.paths)))
    values: dict[RankPath, float] = {(): 1.0}
    for path in tree.paths:
        values[path] = values[path[:-1]] * rank_accuracy(len(path) - 1, path[-1])
    return Acceptance("prior", tuple(round(value, 6) for value in values.values()))

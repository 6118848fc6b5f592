"""How likely a tree's nodes are to be accepted, before anybody has measured it for these heads.

The figures are those of the heads of Vicuna-7B (Medusa-1). They serve to choose a first tree size and
are marked as a prior; a calibration replaces them.
"""

from __future__ import annotations

from medusa_runtime.bundles.bundle import Acceptance
from medusa_runtime.bundles.tree import RankPath, Tree

TOP_1 = (0.560, 0.316, 0.201, 0.147, 0.118)
TOP_5 = (0.780, 0.563, 0.417, 0.340, 0.300)
# Each further rank is right about this much less often than the one before.
RANK_DECAY = 0.6
# Each head beyond those measured is right about this much less often than the one before.
DEPTH_DECAY = 0.8


def rank_accuracy(head: int, rank: int) -> float:
    """The chance that candidate ``rank`` (from 0) of head ``head`` (from 0) is right."""
    measured = min(head, len(TOP_1) - 1)
    scale = DEPTH_DECAY ** (head - measured)
    if rank == 0:
        return scale * TOP_1[measured]
    # Ranks 1 to 4 share what top-5 adds to top-1, geometrically; later ranks go on the same way.
    second = (TOP_5[measured] - TOP_1[measured]) * (1 - RANK_DECAY) / (1 - RANK_DECAY**4)
    return scale * second * RANK_DECAY ** (rank - 1)


def prior_acceptance(tree: Tree, *, trained: bool) -> Acceptance:
    """The chance of each node: the product of the accuracies along its path; none for untrained heads."""
    if not trained:
        return Acceptance("untrained", (1.0, *(0.0 for _ in tree.paths)))
    values: dict[RankPath, float] = {(): 1.0}
    for path in tree.paths:
        values[path] = values[path[:-1]] * rank_accuracy(len(path) - 1, path[-1])
    return Acceptance("prior", tuple(round(value, 6) for value in values.values()))

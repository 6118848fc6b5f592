"""The choice of the path to accept."""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_export.step.acceptance.rule import Verdict
from medusa_export.step.tree_tables import TreeTables


def deepest_confirmed(tables: TreeTables, verdict: Verdict, finite: Tensor, is_prefill: Tensor) -> Tensor:
    """Finds the deepest node that is confirmed with its whole path.

    Of several such nodes it is the one with the largest sum of scores, or the first one without scores.

    Args:
        tables: The lookup tables of the tree.
        verdict: The verdict on each of the R verified nodes.
        finite: [B, R] boolean, False at nodes that can't be accepted because their logits are not finite.
        is_prefill: [B] boolean, True in rows without a draft.

    Returns:
        The index of the node, [B]; 0, the root, if no other node is confirmed.
    """
    verified = finite.shape[1]
    ancestors = tables.ancestors[:verified, :verified]
    wrong = ~(verdict.confirmed & finite) | is_prefill.unsqueeze(1)
    lengths = tables.path_lengths[:verified]
    lengths = torch.where(wrong.unsqueeze(1) & ancestors, 0, lengths.unsqueeze(1)).amin(-1)
    if verdict.score is None:
        return lengths.float().argmax(-1)  # ONNX Runtime has no ArgMax of integers on a GPU
    scores = torch.where(ancestors, verdict.score.unsqueeze(1), 0.0).sum(-1)
    longest = lengths == lengths.amax(-1, keepdim=True)
    return torch.where(longest, scores, -torch.inf).argmax(-1)

"""Medusa-1: trains heads on the hidden states of a frozen base model (MEDUSA, section 2.2.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from medusa_export.common.progress import OnProgress, ignore_progress
from medusa_export.heads.base import DraftHeads
from medusa_export.training.features import Features
from medusa_export.training.run import Schedule, run_training
from medusa_export.training.teacher import Teacher

# The n of top-n accuracies: the target is among the first n candidates.
TOP = (1, 3, 5, 10)
# The loss of head k has the weight HEAD_DECAY^k [2.2.1].
HEAD_DECAY = 0.8


class HeadLoss(nn.Module):
    """Heads with their loss and the ranks of their targets.

    Args:
        heads: The heads to train.
        embedding: The base model's embedding of tokens, for conditioned heads. It is not trained.
        vocab_size: Size of the base model's vocabulary.
        teacher: Computes the base model's logits over the heads' vocabulary; None without soft targets.
        soft: Share of soft targets in the loss, if there is a teacher. A soft target is the base model's distribution
            at the target's position. The rest of the loss is that of the target token.
    """

    draft_ids: Tensor | None

    def __init__(
        self,
        heads: DraftHeads,
        embedding: nn.Module,
        vocab_size: int,
        *,
        teacher: Callable[[Tensor], Tensor] | None = None,
        soft: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self._embedding = (embedding,)  # in a tuple, so that it is neither trained nor saved
        self._teacher = teacher
        self._soft = soft
        ids = None
        if heads.token_map is not None:
            ids = torch.full((vocab_size,), -1)
            ids[heads.token_map] = torch.arange(len(heads.token_map))
        self.register_buffer("draft_ids", ids, persistent=False)

    def forward(
        self, hidden: Tensor, next_tokens: Tensor, targets: Tensor, ahead: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss over a batch of positions, Σ_k 0.8^k · CE_k, and the ranks of the targets.

        Args:
            hidden: The base model's last hidden states, [N, H].
            next_tokens: The token after each position, [N].
            targets: Targets of the heads, [N, K]; -1 without a target.
            ahead: The hidden states from which the base model chose the targets, [N, K, H]; NaN where they are not
                known. Needed for soft targets.

        Returns:
            ``loss``. In eval mode also ``places`` [N, K]: the rank of each target among its head's candidates, at most
            the last of ``TOP``; -1 without a target.
        """
        embedded = None
        if self.heads.config.conditioned:
            with torch.no_grad():
                embedded = self._embedding[0](next_tokens.long()).to(hidden.dtype)
        logits = self.heads(hidden, embedded)
        targets = targets.long()
        labels = targets
        if self.draft_ids is not None:
            labels = torch.where(targets >= 0, self.draft_ids[targets.clamp(min=0)], -1)
        there = labels >= 0
        scores = torch.log_softmax(logits.float(), dim=-1)
        losses = -scores.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        if self._teacher is not None and ahead is not None and self.training:
            known = there & ~ahead[..., 0].isnan()
            soft = -(torch.softmax(self._teacher(ahead.nan_to_num()), dim=-1) * scores).sum(-1)
            losses = torch.where(known, self._soft * soft + (1 - self._soft) * losses, losses)
        weights = HEAD_DECAY ** torch.arange(1, labels.shape[1] + 1, device=losses.device)
        means = (losses * there).sum(0) / there.sum(0).clamp(min=1)
        output = {"loss": (means * weights).sum()}
        if not self.training:
            output["places"] = places(logits, labels, targets)
        return output


def places(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The rank of each label by its logit, [N, K], at most ``TOP[-1]``; -1 without a target.

    Args:
        logits: The heads' logits, [N, K, V'].
        labels: Index of each target in the heads' vocabulary, [N, K]; -1 if it is not in that vocabulary.
        targets: Token ids of the targets, [N, K]; -1 without a target.
    """
    best = logits.topk(min(TOP[-1], logits.shape[-1]), dim=-1).indices
    found = best == labels.unsqueeze(-1)
    rank = torch.where(found.any(-1), found.int().argmax(-1), TOP[-1])
    return torch.where(targets >= 0, rank, -1)


class _Positions(Dataset[dict[str, Tensor]]):
    """Features as a data set that is read a batch at a time.

    Args:
        features: The features.
        ahead: True if batches include the hidden states from which the base model chose the targets.
    """

    def __init__(self, features: Features, *, ahead: bool = False) -> None:
        self._features = features
        self._ahead = ahead

    def __len__(self) -> int:
        return len(self._features)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices)
        features = self._features
        batch = {
            "hidden": features.hidden[rows].float(),
            "next_tokens": features.next_tokens[rows],
            "targets": features.targets[rows],
        }
        if self._ahead:
            steps = torch.arange(1, features.targets.shape[1] + 1)
            known = features.left[rows].unsqueeze(1) >= steps
            ahead = features.hidden[torch.where(known, rows.unsqueeze(1) + steps, 0)].float()
            batch["ahead"] = torch.where(known.unsqueeze(-1), ahead, torch.nan)
        return batch


def accuracies(found: np.ndarray[Any, Any]) -> dict[str, float]:
    """Top-n accuracy of each head, over the positions that have a target.

    Args:
        found: The rank of each target, [N, K]; -1 without a target.
    """
    figures = {}
    for k in range(found.shape[1]):
        own = found[:, k][found[:, k] >= 0]
        for top in TOP:
            figures[f"head{k + 1}_top{top}"] = float((own < top).mean()) if len(own) else 0.0
    return figures


def train_medusa1(
    heads: DraftHeads,
    model: PreTrainedModel,
    train: Features,
    heldout: Features,
    schedule: Schedule,
    checkpoints: Path,
    *,
    teacher: Teacher | None,
    soft: float,
    device: torch.device,
    on_progress: OnProgress = ignore_progress,
) -> list[dict[str, Any]]:
    """Trains heads in place. Continues from the last checkpoint in ``checkpoints``, if there is one.

    Returns:
        The training's log: losses by step, and accuracies on held-out positions by epoch.

    Raises:
        TrainingError: The loss is NaN or infinite.
    """
    vocab_size = model.get_output_embeddings().out_features
    return run_training(
        HeadLoss(heads, model.get_input_embeddings(), vocab_size, teacher=teacher, soft=soft),
        _Positions(train, ahead=teacher is not None),
        _Positions(heldout),
        schedule,
        checkpoints,
        collate=lambda batch: batch,
        metrics=accuracies,
        device=device,
        on_progress=on_progress,
    )

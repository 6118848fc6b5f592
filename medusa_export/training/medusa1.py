"""Medusa-1: heads on a frozen base model, trained on its hidden states (MEDUSA, section 2.2.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from medusa_export.heads.base import DraftHeads
from medusa_export.training.features import Features
from medusa_export.training.run import Schedule, run_training
from medusa_export.training.teacher import Teacher

# A token in the first n candidates counts as found.
TOP = (1, 3, 5, 10)
# Head k counts HEAD_DECAY^k in the loss [2.2.1].
HEAD_DECAY = 0.8


class HeadLoss(nn.Module):
    """Heads, their loss and their hits.

    Args:
        heads: What is trained.
        embedding: The base model's, for conditioned heads; it is not trained.
        vocab_size: Tokens of the base model.
        teacher: Gives the base model's logits over the tokens that heads propose; needed for soft targets.
        soft: Where there is a teacher, how much of the loss asks for the base model's whole distribution at the
            target's place; the rest asks for the target alone.
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
        """The loss over a batch of positions, Σ_k 0.8^k · CE_k, and hits.

        Args:
            hidden: [N, H].
            next_tokens: [N].
            targets: [N, K]; -1 where there is none.
            ahead: [N, K, H], the hidden states that the base model chose the targets from; NaN where they are not
                known. Needed for soft targets.

        Returns:
            ``loss``, and in eval mode ``places`` [N, K]: at which place among a head's candidates its target
            stands, no further than the last of ``TOP``; -1 where there is no target.
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
    """The rank of each label among the logits [N, K, V'], at most ``TOP[-1]``; -1 where there is no target."""
    best = logits.topk(min(TOP[-1], logits.shape[-1]), dim=-1).indices
    found = best == labels.unsqueeze(-1)
    rank = torch.where(found.any(-1), found.int().argmax(-1), TOP[-1])
    return torch.where(targets >= 0, rank, -1)


class _Positions(Dataset[dict[str, Tensor]]):
    """Features, handed out a batch at a time; with the hidden states ahead if they are asked for."""

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
    """Top-n accuracy of each head from places [N, K], over the targets that exist."""
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
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Trains heads in place; goes on from the last checkpoint in ``checkpoints``, if there is one.

    Returns:
        What was logged: losses by step, and by epoch the accuracies on held-out positions.

    Raises:
        TrainingError: The loss is no longer a number.
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
        quiet=quiet,
    )

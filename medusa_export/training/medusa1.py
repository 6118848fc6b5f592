"""Medusa-1: heads on a frozen base model, trained on its hidden states (MEDUSA, section 2.2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from medusa_export.errors import TrainingError
from medusa_export.heads import MedusaHeads
from medusa_export.training.features import Features

# A token in the first n candidates counts as found.
TOP = (1, 3, 5, 10)


@dataclass(frozen=True)
class Recipe:
    """How heads are trained; the defaults are the paper's where it gives one.

    Attributes:
        epochs: Passes over the data.
        learning_rate: At its peak; it falls along a cosine.
        batch_size: Positions per step.
        warmup_steps: Until the peak.
        weight_decay: AdamW's.
        head_decay: Head k counts head_decay^k in the loss.
        soft: How much of the loss asks for the base model's whole distribution at the target's place; the rest asks
            for the target alone.
        seed: For the order of the data.
        bf16: Matrix products in bfloat16.
    """

    epochs: float = 5.0
    learning_rate: float = 2e-3
    batch_size: int = 2048
    warmup_steps: int = 40
    weight_decay: float = 0.0
    head_decay: float = 0.8
    soft: float = 0.0
    seed: int = 0
    bf16: bool = False


class HeadLoss(nn.Module):
    """Heads, their loss and their hits.

    Args:
        heads: What is trained.
        embedding: The base model's, for conditioned heads; it is not trained.
        lm_head: The base model's, for what it would say itself; it is not trained.
        head_decay: Head k counts head_decay^k.
        soft: See ``Recipe``.
    """

    draft_ids: Tensor | None
    teacher_rows: Tensor | None

    def __init__(
        self,
        heads: MedusaHeads,
        embedding: nn.Module,
        lm_head: nn.Linear,
        *,
        head_decay: float = 1.0,
        soft: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self._embedding = (embedding,)  # in a tuple, so that it is neither trained nor saved
        self._head_decay = head_decay
        self._soft = soft
        ids = None
        if heads.token_map is not None:
            ids = torch.full((lm_head.out_features,), -1)
            ids[heads.token_map] = torch.arange(len(heads.token_map))
        self.register_buffer("draft_ids", ids, persistent=False)
        rows = None
        if soft:
            rows = lm_head.weight.detach()
            rows = rows if heads.token_map is None else rows[heads.token_map]
        self.register_buffer("teacher_rows", rows, persistent=False)

    def forward(
        self, hidden: Tensor, next_tokens: Tensor, targets: Tensor, ahead: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss over a batch of positions, Σ_k head_decay^k · CE_k, and hits.

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
        if self._soft and ahead is not None and self.training:
            known = there & ~ahead[..., 0].isnan()
            soft = -(self._teacher(ahead) * scores).sum(-1)
            losses = torch.where(known, self._soft * soft + (1 - self._soft) * losses, losses)
        weights = self._head_decay ** torch.arange(1, labels.shape[1] + 1, device=losses.device)
        means = (losses * there).sum(0) / there.sum(0).clamp(min=1)
        output = {"loss": (means * weights).sum()}
        if not self.training:
            output["places"] = places(logits, labels, targets)
        return output

    @torch.no_grad()
    def _teacher(self, ahead: Tensor) -> Tensor:
        """The base model's own distribution over the draft vocabulary, [N, K, V']."""
        assert self.teacher_rows is not None
        return torch.softmax((ahead.nan_to_num().to(self.teacher_rows.dtype) @ self.teacher_rows.T).float(), dim=-1)


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
    heads: MedusaHeads,
    embedding: nn.Module,
    lm_head: nn.Linear,
    train: Features,
    heldout: Features,
    recipe: Recipe,
    checkpoints: Path,
    *,
    device: torch.device,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Trains heads in place; goes on from the last checkpoint in ``checkpoints``, if there is one.

    Returns:
        What was logged: losses by step, and by epoch the accuracies on held-out positions.

    Raises:
        TrainingError: The loss is no longer a number.
    """
    model = HeadLoss(heads, embedding, lm_head, head_decay=recipe.head_decay, soft=recipe.soft)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=1.0,
        bf16=recipe.bf16,
        use_cpu=device.type == "cpu",
        seed=recipe.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=10,
        label_names=["targets"],
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=quiet,
        dataloader_pin_memory=device.type == "cuda",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_Positions(train, ahead=recipe.soft > 0),
        eval_dataset=_Positions(heldout),
        data_collator=lambda batch: batch,
        compute_metrics=_metrics,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    history: list[dict[str, Any]] = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses and not np.isfinite(losses[-1]):
        raise TrainingError("The loss is no longer a number: lower --learning-rate, or train without bf16.")
    return history


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    found = prediction.predictions
    return accuracies(found[0] if isinstance(found, tuple) else found)

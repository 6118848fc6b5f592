"""Trains heads while the base model runs. With LoRA, the base model is trained as well.

With LoRA this is Medusa-2 (MEDUSA, sections 2.2.2 and 2.3.2). The base model's distribution shall stay the same,
measured by KL(p_original || p), while its hidden states become easier for the heads. Without LoRA this is Medusa-1, for
data whose hidden states don't fit on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from medusa_export.common.progress import OnProgress, ignore_progress
from medusa_export.compat.peft import lora_as_named
from medusa_export.compat.transformers import quiet_libraries
from medusa_export.heads.base import DraftHeads
from medusa_export.training.conversations import Sample
from medusa_export.training.features import hidden_states, padded, positions_of
from medusa_export.training.medusa1 import HeadLoss, accuracies
from medusa_export.training.run import Schedule, run_training

_NONE = -1  # marks empty cells of tables


@dataclass(frozen=True)
class Lora:
    """Settings of LoRA. The defaults are those of the MEDUSA paper.

    Attributes:
        rank: Rank of the matrices.
        alpha: The product of the matrices is scaled by alpha / rank.
        dropout: Dropout before the matrices.
        heads_weight: Final weight λ0 of the heads' loss, relative to the KL divergence. In training it grows as
            sin(π/2 · t/T).
        heads_rate: The heads' learning rate, as a multiple of LoRA's.
    """

    rank: int = 32
    alpha: int = 16
    dropout: float = 0.05
    heads_weight: float = 0.01
    heads_rate: float = 4.0


def adapt(model: PreTrainedModel, heads: DraftHeads, lora: Lora, *, seed: int = 0) -> PeftModel:
    """Adds LoRA to all linear layers of a model, in place.

    The ``lm_head`` is left out if its weight has another use: tied embeddings, or heads that project with it.
    """
    lm_head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    used = heads.shares_lm_head or getattr(embedding, "weight", None) is lm_head.weight
    names = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and not (used and module is lm_head)
    ]
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)  # so that a job that continues starts from the same matrices as one that was never killed
    with quiet_libraries(), lora_as_named():
        adapted: PeftModel = get_peft_model(model, config)
    return adapted


class JointLoss(nn.Module):
    """The base model with its heads, the loss of both, and the base model's quality.

    Args:
        model: The base model. With LoRA, the original base model is the teacher.
        heads: The heads.
        heads_weight: Weight of the heads' loss.

    Attributes:
        heads_weight: Weight of the heads' loss.
        ramp: Factor of this weight in training. Held-out losses don't use it, so they can be compared.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, heads: DraftHeads, *, heads_weight: float = 1.0) -> None:
        super().__init__()
        self.model: Any = model
        self.adapted = isinstance(model, PeftModel)
        vocab_size = self.model.get_output_embeddings().out_features
        self.head_loss = HeadLoss(heads, self.model.get_input_embeddings(), vocab_size)
        self.heads_weight = heads_weight
        self.ramp = 1.0
        self.trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_miss_no_frozen)  # type: ignore[no-untyped-call]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, predicts: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        """The loss over a batch of conversations, KL(p_original || p) + ramp · heads_weight · Σ_k 0.8^k · CE_k.

        Args:
            input_ids: Token ids, [B, S].
            attention_mask: 1 for tokens and 0 for padding, [B, S].
            predicts: [B, S] boolean, True where the assistant wrote the next token.
            targets: Targets of the heads, [B, S, K]; -1 without a target.

        Returns:
            ``loss``. In eval mode also ``places`` [B, S, K], as in ``HeadLoss``, and with LoRA ``quality`` [B, S, 4]:
            the negative log-likelihood of the next token, the same for the original base model, the KL divergence of
            both, and 1 if both would choose the same token. -1 where ``predicts`` is False.
        """
        next_tokens = input_ids.roll(-1, 1)
        drafts = targets[..., 0] >= 0
        hidden, logits = hidden_states(self.model, input_ids, attention_mask, predicts if self.adapted else None)
        found = self.head_loss(hidden[drafts].float(), next_tokens[drafts], targets[drafts])
        output = {"loss": (self.ramp if self.training else 1.0) * self.heads_weight * found["loss"]}
        if not self.training:
            output["places"] = targets.new_full(targets.shape, _NONE)
            output["places"][drafts] = found["places"]
        if self.adapted:
            with self._original(), torch.no_grad():
                _, teacher = hidden_states(self.model, input_ids, attention_mask, predicts)
            own, was = (torch.log_softmax(scores[0].float(), -1) for scores in (logits, teacher))
            divergence = (was.exp() * (was - own)).sum(-1)
            output["loss"] = output["loss"] + divergence.sum() / max(len(divergence), 1)
            if not self.training:
                said = next_tokens[predicts].unsqueeze(-1)
                columns = [-own.gather(-1, said)[:, 0], -was.gather(-1, said)[:, 0], divergence.clamp(min=0)]
                same = (own.argmax(-1) == was.argmax(-1)).float()
                output["quality"] = own.new_full((*predicts.shape, 4), _NONE)
                output["quality"][predicts] = torch.stack([*columns, same], -1)
        return output

    def train(self, mode: bool = True) -> JointLoss:
        """Sets the mode. Without LoRA the base model stays in eval mode: heads get the states that inference gives."""
        super().train(mode)
        if not self.adapted:
            self.model.eval()
        return self

    @contextmanager
    def _original(self) -> Iterator[None]:
        """A context manager in which the base model runs without LoRA and without dropout."""
        training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self.model.train(training)


def _drop_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """Removes frozen weights from a checkpoint: they are loaded with the base model anyway."""
    assert isinstance(module, JointLoss)
    for name in list(state):
        if name.startswith(prefix) and name.removeprefix(prefix) not in module.trained:
            del state[name]


def _miss_no_frozen(module: nn.Module, keys: Any) -> None:
    """Removes frozen weights from the list of missing keys when a checkpoint is loaded."""
    assert isinstance(module, JointLoss)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in module.trained]


class _Ramp(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Increases the weight of the heads' loss in training, as sin(π/2 · t/T)."""

    def __init__(self, loss: JointLoss) -> None:
        self._loss = loss

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._loss.ramp = math.sin(math.pi / 2 * (state.global_step + 1) / state.max_steps)


class _Samples(Dataset[Sample]):
    """Conversations as tokens."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def collate(samples: Sequence[Sample], *, num_heads: int, max_length: int) -> dict[str, Tensor]:
    """Samples, cut to ``max_length`` and padded, as the inputs of ``JointLoss``."""
    short = [sample.cut(max_length) for sample in samples]
    ids, mask = padded(short)
    predicts = torch.zeros(ids.shape, dtype=torch.bool)
    targets = torch.full((*ids.shape, num_heads), _NONE)
    for row, sample in enumerate(short):
        predicts[row, : len(sample.input_ids) - 1] = torch.tensor(sample.is_label[1:], dtype=torch.bool)
        positions, found = positions_of(sample, num_heads)
        if positions:
            targets[row, positions] = torch.tensor(found)
    return {"input_ids": ids, "attention_mask": mask, "predicts": predicts, "targets": targets}


def train_joint(
    model: PreTrainedModel | PeftModel,
    heads: DraftHeads,
    train: Sequence[Sample],
    heldout: Sequence[Sample],
    schedule: Schedule,
    checkpoints: Path,
    *,
    lora: Lora,
    max_length: int,
    device: torch.device,
    on_progress: OnProgress = ignore_progress,
) -> list[dict[str, Any]]:
    """Trains heads, and LoRA if the model has it, in place. Continues from the last checkpoint, if there is one.

    Returns:
        The training's log: losses by step, and figures on held-out conversations before the first step and by epoch.

    Raises:
        TrainingError: The loss is NaN or infinite.
    """
    adapted = isinstance(model, PeftModel)
    module = JointLoss(model, heads, heads_weight=lora.heads_weight if adapted else 1.0)
    ramp, optimizer = [], None
    if adapted:
        ramp = [_Ramp(module)]
        ours = [parameter for parameter in heads.parameters() if parameter.requires_grad]
        theirs = [parameter for parameter in module.model.parameters() if parameter.requires_grad]
        rate = schedule.learning_rate
        groups: list[dict[str, Any]] = [{"params": theirs, "lr": rate}, {"params": ours, "lr": rate * lora.heads_rate}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    return run_training(
        module,
        _Samples(train),
        _Samples(heldout),
        schedule,
        checkpoints,
        collate=lambda batch: collate(batch, num_heads=heads.config.num_heads, max_length=max_length),
        metrics=_metrics,
        device=device,
        on_progress=on_progress,
        optimizer=optimizer,
        callbacks=ramp,
    )


@torch.inference_mode()
def perplexity(model: PreTrainedModel, batches: Iterable[Sequence[Sample]]) -> float:
    """The model's perplexity on the tokens that the assistant wrote."""
    total, count = 0.0, 0
    for batch in batches:
        made = collate(batch, num_heads=1, max_length=max(len(sample.input_ids) for sample in batch))
        predicts = made["predicts"]
        _, logits = hidden_states(
            model,
            made["input_ids"].to(model.device),
            made["attention_mask"].to(model.device),
            predicts.to(model.device),
        )
        said = made["input_ids"].roll(-1, 1)[predicts].to(model.device)
        total += float(nn.functional.cross_entropy(logits[0].float(), said, reduction="sum"))
        count += len(said)
    return math.exp(total / max(count, 1))


def _metrics(places: NDArray[Any], *quality: NDArray[Any]) -> dict[str, float]:
    """Figures from the outputs of ``JointLoss``: accuracies of heads, and the base model's quality with LoRA."""
    figures = accuracies(places.reshape(-1, places.shape[-1]))
    for table in quality:
        rows = table[table[..., 0] >= 0]
        nll, nll_before, divergence, same = np.asarray(rows, np.float64).mean(0)
        figures |= {
            "perplexity": float(np.exp(nll)),
            "perplexity_before": float(np.exp(nll_before)),
            "kl": float(divergence),
            "same_choice": float(same),
        }
    return figures

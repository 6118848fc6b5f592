"""A training from its data to trained heads: both recipes, on hidden states that are kept or computed anew."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa_export.common.errors import SettingsError, TrainingError
from medusa_export.heads.base import DraftHeads
from medusa_export.heads.files import load_heads
from medusa_export.heads.modules import MedusaHeads
from medusa_export.heads.writer import check_config, save_heads
from medusa_export.models.checkpoints import save_model
from medusa_export.training import settings
from medusa_export.training.conversations import Sample
from medusa_export.training.features import (
    FeatureKey,
    Features,
    batched,
    compute_features,
    digest_of,
    digest_of_samples,
    fingerprint,
    frequent_tokens,
    size_of,
)
from medusa_export.training.joint import Lora, adapt, perplexity, train_joint
from medusa_export.training.medusa1 import train_medusa1
from medusa_export.training.processes import Processes
from medusa_export.training.run import Schedule
from medusa_export.training.teacher import Teacher

History = list[dict[str, Any]]

_FEATURES = "features"
# Not those of a training on kept hidden states, which are of another shape.
_ONLINE_CHECKPOINTS = "online_checkpoints"
_CHECKPOINTS, _JOINT_CHECKPOINTS = "checkpoints", "joint_checkpoints"
SETTINGS = "settings.json"
_WITHOUT_ROOM = "train on fewer conversations with --limit, or compute them in every epoch with --hidden-states online"


@dataclass(frozen=True)
class HeadShape:
    """What fresh heads look like.

    Attributes:
        num_heads: K.
        num_layers: Residual blocks per head.
        conditioned: They are given the token that the base model has chosen.
        draft_vocab: How many tokens they can propose, the most frequent; None for all.
        own_projections: Each has an output projection of its own, which is trained.
    """

    num_heads: int
    num_layers: int
    conditioned: bool
    draft_vocab: int | None
    own_projections: bool


class TrainingJob:
    """A base model, data, and a folder for what is kept between runs.

    Args:
        model: The base model, on the device to train on.
        source: Where it was loaded from.
        tokenizer: Its tokenizer, with a chat template.
        samples: The samples of each data set, by the name of the split.
        folder: For hidden states and checkpoints.
        processes: Those that train together.
        max_length: Tokens of a conversation, at most.
        quiet: No progress.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        samples: Mapping[str, Sequence[list[Sample]]],
        folder: Path,
        processes: Processes,
        max_length: int,
        *,
        quiet: bool,
    ) -> None:
        self._model, self._source, self._tokenizer, self._folder = model, source, tokenizer, folder
        self._processes, self._max_length, self._quiet = processes, max_length, quiet
        self._changed = False
        self._samples = samples
        # Of tokens, which depend on the chat template, too.
        self._digests = {name: [digest_of_samples(part) for part in parts] for name, parts in self._samples.items()}

    def begin(self, heads: DraftHeads, asked: Mapping[str, Any], found: Mapping[str, Any] | None = None) -> None:
        """Keeps in the folder what the training is of, or holds it against that of checkpoints that are there.

        Args:
            heads: Those that it starts from.
            asked: All else that shapes the result, as JSON knows it.
            found: What else to keep about the data, as JSON knows it.

        Raises:
            SettingsError: The folder is another training's.
            OutputError: It can't be written to, or the heads can't in the end.
        """
        check_config(self._folder)
        path = self._folder / SETTINGS
        with self._processes.main_first():
            kept = any(
                any((self._folder / name).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
                for name in (_CHECKPOINTS, _ONLINE_CHECKPOINTS, _JOINT_CHECKPOINTS)
            )
            if kept and not path.is_file():
                raise SettingsError(
                    f"{self._folder} holds checkpoints but no {SETTINGS}, so nobody knows what of: delete them, or "
                    "give another folder."
                )
            identity = {
                "model": fingerprint(self._model),
                "data": self._digests,
                "heads": digest_of(heads.state_dict()),
                "processes": self._processes.count,  # what a step is, and an epoch in steps, depends on it
            }
            settings.begin(path, {**asked, **identity}, anew=not kept)
            if self._processes.is_main:
                settings.note(path, **(found or {}))

    def samples(self, split: str) -> list[Sample]:
        """The conversations of all data sets."""
        return [sample for part in self._samples[split] for sample in part]

    def tokens(self, split: str) -> int:
        """How many tokens the assistant wrote in them."""
        return sum(sum(sample.is_label) for sample in self.samples(split))

    def fresh_heads(self, shape: HeadShape) -> DraftHeads:
        """Untrained heads, in fp32.

        Raises:
            TrainingError: They are to propose more tokens than there are.
        """
        token_map = None
        if shape.draft_vocab is not None:
            if shape.draft_vocab > self._lm_head.out_features:
                raise TrainingError(
                    f"Heads can't propose {shape.draft_vocab:,} tokens: this model has {self._lm_head.out_features:,}."
                )
            token_map = frequent_tokens(self.samples("train"), shape.draft_vocab)
        heads = MedusaHeads.fresh(
            shape.num_heads,
            self._lm_head,
            num_layers=shape.num_layers,
            conditioned=shape.conditioned,
            token_map=token_map,
            own_projections=shape.own_projections,
        )
        return self._trainable(heads, projections=shape.own_projections)

    def loaded_heads(self, path: str, *, projections: bool) -> DraftHeads:
        """Heads to train on, in fp32; their own projections too, if asked for.

        Raises:
            CheckpointError: They can't be read, or belong to another model.
        """
        return self._trainable(load_heads(path, self._model), projections=projections)

    def _trainable(self, heads: DraftHeads, *, projections: bool) -> DraftHeads:
        heads = heads.float().to(self._processes.device)
        heads.set_trainable(projections=projections)
        return heads

    def medusa1(
        self, heads: DraftHeads, schedule: Schedule, *, soft: float, hidden_states: str, conversations: int
    ) -> History:
        """Trains heads in place; the base model stays as it is.

        Args:
            heads: Fresh ones or not.
            schedule: Its batch size is in positions.
            soft: See ``HeadLoss``; needs hidden states that are kept.
            hidden_states: ``cached``, ``online``, or ``auto``: cached if there is room.
            conversations: The batch size where they are computed anew.

        Raises:
            DatasetError: There is nothing to learn from, or no room.
            TrainingError: The loss is no longer a number, or soft targets can't be had.
        """
        if hidden_states == "online" or (hidden_states == "auto" and not self._fits()):
            if soft:
                raise TrainingError(
                    "Soft targets (--soft) need hidden states that are kept, and there is no room for them, or they "
                    "are to be computed anew: leave --soft out, or make room, with --limit for instance."
                )
            schedule = replace(schedule, batch_size=conversations)
            return self._joint(self._model, heads, schedule, _ONLINE_CHECKPOINTS, Lora())
        teacher = Teacher(self._model, heads.token_map) if soft else None  # refuses before hours are spent
        return train_medusa1(
            heads,
            self._model,
            self._features("train", heads.config.num_heads),
            self._features("heldout", heads.config.num_heads),
            schedule,
            self._folder / _CHECKPOINTS,
            teacher=teacher,
            soft=soft,
            device=self._processes.device,
            quiet=self._quiet,
        )

    def medusa2(self, heads: DraftHeads, schedule: Schedule, lora: Lora) -> History:
        """Trains heads in place, and the base model with LoRA, which is then merged into it.

        Raises:
            TrainingError: The loss is no longer a number.
        """
        adapted: Any = adapt(self._model, heads, lora, seed=schedule.seed)
        history = self._joint(adapted, heads, schedule, _JOINT_CHECKPOINTS, lora)
        self._model = adapted.merge_and_unload().eval().requires_grad_(False)
        self._changed = True
        # Merged weights are rounded to those of the model, in which little changes may be lost.
        history.append(
            {"merged_perplexity": perplexity(self._model, batched(self.samples("heldout"), self._max_length))}
        )
        return history

    def save(self, heads: DraftHeads, dtype: torch.dtype) -> None:
        """Writes heads to the folder, and the model to ``model`` within it if it isn't what it was.

        Args:
            heads: The trained heads.
            dtype: What their weights are rounded to.

        Raises:
            OutputError: They can't be written.
        """
        source = self._source
        if self._changed:
            source = str(self._folder / "model")
            save_model(self._model, self._tokenizer, Path(source))
        save_heads(heads, self._folder, base_model_name_or_path=source, dtype=dtype, lm_head=self._lm_head)

    def _joint(self, model: Any, heads: DraftHeads, schedule: Schedule, checkpoints: str, lora: Lora) -> History:
        return train_joint(
            model,
            heads,
            self.samples("train"),
            self.samples("heldout"),
            schedule,
            self._folder / checkpoints,
            lora=lora,
            max_length=self._max_length,
            device=self._processes.device,
            quiet=self._quiet,
        )

    def _features(self, split: str, num_heads: int) -> Features:
        parts = []
        for digest, samples in zip(self._digests[split], self._samples[split], strict=True):
            key = FeatureKey.of(self._model, Path(self._source).name, digest, num_heads, self._max_length)
            with self._processes.main_first():
                folder = self._folder / _FEATURES / f"{split}-{digest[:12]}"
                found = compute_features(
                    self._model, samples, folder, key, name=split, otherwise=_WITHOUT_ROOM, quiet=self._quiet
                )
            parts.append(found)
        return Features.join(parts)

    def _fits(self) -> bool:
        """Hidden states may take what the disk has, and half of the memory that is free; what was begun goes on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        size = size_of(self._model, [self.samples(split) for split in self._samples])
        memory: int = psutil.virtual_memory().available // self._processes.on_this_machine
        fits = size < min(shutil.disk_usage(self._folder).free, memory // 2)
        if (self._folder / _FEATURES).is_dir() or (self._folder / _ONLINE_CHECKPOINTS).is_dir():
            fits = (self._folder / _FEATURES).is_dir()
        return self._processes.agreed(fits)

    @property
    def _lm_head(self) -> nn.Linear:
        lm_head: nn.Linear = self._model.get_output_embeddings()
        return lm_head

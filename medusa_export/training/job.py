"""A training from its data to trained heads, by both recipes.

Hidden states are computed once and kept, or computed again in each epoch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa_export.common.errors import SettingsError, TrainingError
from medusa_export.common.progress import OnProgress, Progress
from medusa_export.heads.architecture import head_architecture
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
from medusa_export.training.options import HeadShape
from medusa_export.training.processes import Processes
from medusa_export.training.run import Schedule
from medusa_export.training.teacher import Teacher

History = list[dict[str, Any]]

_FEATURES = "features"
# Another folder than for a training on kept hidden states, whose checkpoints have other shapes.
_ONLINE_CHECKPOINTS = "online_checkpoints"
_CHECKPOINTS, _JOINT_CHECKPOINTS = "checkpoints", "joint_checkpoints"
SETTINGS = "settings.json"
_WITHOUT_ROOM = (
    "train on fewer conversations with `limit`, or compute them in every epoch with `hidden_states='online'`"
)


class TrainingJob:
    """A base model, data, and a folder that keeps hidden states and checkpoints between runs.

    Args:
        model: The base model, on the device to train on.
        source: Folder, file or hub id that the model was loaded from.
        tokenizer: The model's tokenizer, with a chat template.
        samples: The samples of each data set, by the name of the split.
        folder: The folder.
        processes: The processes that train together.
        max_length: Tokens of a conversation, at most.
        on_progress: Receives reports on the job.
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
        on_progress: OnProgress,
    ) -> None:
        self._model, self._source, self._tokenizer, self._folder = model, source, tokenizer, folder
        self._processes, self._max_length, self._on_progress = processes, max_length, on_progress
        self._changed = False
        self._samples = samples
        # Digests of tokens, which also depend on the chat template.
        self._digests = {name: [digest_of_samples(part) for part in parts] for name, parts in self._samples.items()}

    def begin(self, heads: DraftHeads, asked: Mapping[str, Any], found: Mapping[str, Any] | None = None) -> None:
        """Records the training's settings in the folder, or compares them with those of existing checkpoints.

        Args:
            heads: The heads at the start of the training.
            asked: All other settings that determine the result, as JSON values.
            found: More facts about the data to keep, as JSON values.

        Raises:
            SettingsError: The folder belongs to another training.
            OutputError: The folder can't be written to.
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
                    f"{self._folder} holds checkpoints but no {SETTINGS}, so it is unknown which training they belong "
                    "to: delete them, or give another folder."
                )
            identity = {
                "model": fingerprint(self._model),
                "data": self._digests,
                "heads": digest_of(heads.state_dict()),
                "processes": self._processes.count,  # it determines the batch of a step and the steps of an epoch
            }
            settings.begin(path, {**asked, **identity}, restart=not kept)
            if self._processes.is_main:
                settings.note(path, **(found or {}))

    def samples(self, split: str) -> list[Sample]:
        """The samples of a split, of all data sets."""
        return [sample for part in self._samples[split] for sample in part]

    def tokens(self, split: str) -> int:
        """Number of tokens of a split that the assistant wrote."""
        return sum(sum(sample.is_label) for sample in self.samples(split))

    def fresh_heads(self, shape: HeadShape, *, own_projections: bool, seed: int) -> DraftHeads:
        """Makes untrained heads, in fp32.

        Args:
            shape: The shape of the heads.
            own_projections: Train an output projection for each head.
            seed: Seed of random weights.

        Raises:
            ExtensionError: There is no head architecture of that name.
            OptionError: The architecture has no heads of this shape.
            TrainingError: The heads' vocabulary is larger than the model's.
        """
        if shape.architecture != MedusaHeads.architecture:
            heads = head_architecture(shape.architecture).fresh(shape.num_heads, self._lm_head, seed=seed)
            return self._trainable(heads, projections=own_projections)
        return self._trainable(self._medusa_heads(shape, own_projections=own_projections), projections=own_projections)

    def _medusa_heads(self, shape: HeadShape, *, own_projections: bool) -> MedusaHeads:
        token_map = None
        if shape.draft_vocab is not None:
            if shape.draft_vocab > self._lm_head.out_features:
                raise TrainingError(
                    f"Heads can't propose {shape.draft_vocab:,} tokens: this model has {self._lm_head.out_features:,}."
                )
            token_map = frequent_tokens(self.samples("train"), shape.draft_vocab)
        return MedusaHeads.fresh(
            shape.num_heads,
            self._lm_head,
            num_layers=shape.num_layers,
            conditioned=shape.conditioned,
            token_map=token_map,
            own_projections=own_projections,
        )

    def loaded_heads(self, path: str, *, projections: bool) -> DraftHeads:
        """Loads heads to continue training them, in fp32.

        Args:
            path: The heads: a file, a folder or a hub id.
            projections: True to train the heads' own output projections as well.

        Raises:
            CheckpointError: The heads can't be read, or belong to another model.
        """
        return self._trainable(load_heads(path, self._model), projections=projections)

    def _trainable(self, heads: DraftHeads, *, projections: bool) -> DraftHeads:
        heads = heads.float().to(self._processes.device)
        heads.set_trainable(projections=projections)
        return heads

    def medusa1(
        self, heads: DraftHeads, schedule: Schedule, *, soft: float, hidden_states: str, conversations: int
    ) -> History:
        """Trains heads in place, without changing the base model.

        Args:
            heads: The heads, untrained or trained.
            schedule: The schedule. Its batch size is in positions.
            soft: Weight of soft targets, see ``HeadLoss``. They need hidden states that are kept.
            hidden_states: ``cached`` (computed once and kept), ``online`` (computed in each epoch), or ``auto``:
                ``cached`` if there is room.
            conversations: Conversations per batch if hidden states are computed in each epoch.

        Raises:
            DatasetError: There is nothing to learn from, or no room for hidden states.
            TrainingError: The loss is NaN or infinite, or soft targets are not possible.
        """
        if hidden_states == "online" or (hidden_states == "auto" and not self._fits()):
            if soft:
                raise TrainingError(
                    "Soft targets (`soft`) need hidden states that are kept, but there is no room for them, or "
                    "`hidden_states` is 'online': leave `soft` out, or make room, for instance with `limit`."
                )
            schedule = replace(schedule, batch_size=conversations)
            return self._joint(self._model, heads, schedule, _ONLINE_CHECKPOINTS, Lora())
        teacher = Teacher(self._model, heads.token_map) if soft else None  # first, as it may refuse the model
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
            on_progress=self._on_progress,
        )

    def medusa2(self, heads: DraftHeads, schedule: Schedule, lora: Lora) -> History:
        """Trains heads in place, and the base model with LoRA. Then merges LoRA into the base model.

        Raises:
            TrainingError: The loss is NaN or infinite.
        """
        adapted: Any = adapt(self._model, heads, lora, seed=schedule.seed)
        history = self._joint(adapted, heads, schedule, _JOINT_CHECKPOINTS, lora)
        self._model = adapted.merge_and_unload().eval().requires_grad_(False)
        self._changed = True
        # Merged weights are rounded to the model's type, which may lose small changes. So quality is measured again.
        history.append(
            {"merged_perplexity": perplexity(self._model, batched(self.samples("heldout"), self._max_length))}
        )
        return history

    def save(self, heads: DraftHeads, dtype: torch.dtype) -> None:
        """Writes heads to the folder. If the base model was changed, writes it to the folder's ``model``.

        Args:
            heads: The trained heads.
            dtype: Type to round the heads' weights to.

        Raises:
            OutputError: The files can't be written.
        """
        self._on_progress(Progress("saving"))
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
            on_progress=self._on_progress,
        )

    def _features(self, split: str, num_heads: int) -> Features:
        parts = []
        for digest, samples in zip(self._digests[split], self._samples[split], strict=True):
            key = FeatureKey.of(self._model, Path(self._source).name, digest, num_heads, self._max_length)
            with self._processes.main_first():
                folder = self._folder / _FEATURES / f"{split}-{digest[:12]}"
                found = compute_features(
                    self._model,
                    samples,
                    folder,
                    key,
                    name=split,
                    otherwise=_WITHOUT_ROOM,
                    on_progress=self._on_progress,
                )
            parts.append(found)
        return Features.join(parts)

    def _fits(self) -> bool:
        """True if hidden states fit into the free disk space and half of the free memory.

        A training that was begun continues in the way that it began.
        """
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

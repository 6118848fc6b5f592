"""A weight format: a folder with ``config.json`` and all weights in ``weights.npz``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from medusa_export.models.checkpoint import Checkpoint, LoadedModel, Precision, StoredWeight, from_pretrained
from medusa_export.models.files import Place


class NpzCheckpoint(Checkpoint):
    """A folder with weights in NumPy's archive format, under the names that transformers uses."""

    @classmethod
    def recognizes(cls, place: Place) -> bool:
        return place.folder is not None and (place.folder / "weights.npz").is_file()

    @property
    def folder(self) -> Path:
        assert self.place.folder is not None
        return self.place.folder

    def config(self) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(self.folder)

    def load(self, config: PreTrainedConfig, precision: Precision) -> LoadedModel:
        with np.load(self.folder / "weights.npz") as archive:
            state = {name: torch.from_numpy(archive[name]) for name in archive.files}
        return from_pretrained(config, precision, state_dict=state)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return None

    def stored_weights(self, model: PreTrainedModel) -> Iterator[StoredWeight]:
        with np.load(self.folder / "weights.npz") as archive:
            for name in archive.files:
                yield StoredWeight(name, None, torch.from_numpy(archive[name]))

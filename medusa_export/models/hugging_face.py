"""Checkpoints in Hugging Face's layout: a folder or a hub id, with safetensors or PyTorch files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from medusa_export.common.errors import CheckpointError
from medusa_export.models.checkpoint import Checkpoint, LoadedModel, Precision, StoredWeight, from_pretrained
from medusa_export.models.files import CONFIG, Place, check_file, check_folder, weight_files

# A model has a tokenizer if it has one of these files.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


class HuggingFaceCheckpoint(Checkpoint):
    """A model in Hugging Face's layout: ``config.json`` with safetensors or PyTorch files."""

    @classmethod
    def recognizes(cls, place: Place) -> bool:
        return place.single_file is None

    @property
    def path(self) -> str:
        """The folder or hub id, as transformers' ``from_pretrained`` takes it."""
        return self.place.source if self.place.folder is None else str(self.place.folder)

    def check(self) -> None:
        check_folder(self.place)

    def config(self) -> PreTrainedConfig:
        file = self.place.file(CONFIG)
        if file is not None:
            _check_settings(self.place.source, file)
        config: PreTrainedConfig = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        return config

    def load(self, config: PreTrainedConfig, precision: Precision) -> LoadedModel:
        weight_files(self.place, getattr(config, "transformers_weights", None))
        return from_pretrained(config, precision, self.path)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        found = [file for file in map(self.place.file, _TOKENIZER_FILES) if file is not None]
        for file in found:
            check_file(file)
        if not found:
            return None
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        return tokenizer

    def stored_weights(self, model: PreTrainedModel) -> Iterator[StoredWeight]:
        for file in weight_files(self.place, _named_weights(self.place)):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  # no dictionary
                        yield StoredWeight(name, None, opened.get_tensor(name))
            else:
                for name, tensor in _unpickled(file).items():
                    yield StoredWeight(name, None, tensor)


def _check_settings(source: str, file: Path) -> None:
    """Refuses a model whose weights are packed, or whose architecture transformers doesn't have."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"The config.json of {source} is not valid JSON ({e}): restore the file.") from e
    if not isinstance(settings, dict):
        raise CheckpointError(f"The config.json of {source} holds no settings: restore the file.")
    packed = settings.get("quantization_config") or settings.get("compression_config")
    if packed:
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        raise CheckpointError(
            f"{source} holds weights packed by {method or 'a quantizer'} (quantization_config in its {CONFIG}), which "
            "can't be exported: give the model that it was made from, with weights in fp32, fp16 or bf16."
        )
    kind = settings.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if "medusa_num_heads" in settings:
        base = settings.get("base_model_name_or_path")
        raise CheckpointError(
            f"{source} holds MEDUSA heads, not a base model: give its base{f', {base}' if base else ''} and load the "
            "heads beside it."
        )
    raise CheckpointError(
        f"{source} is of an architecture that transformers does not know (model_type {kind!r}): give a model that it "
        "implements, or use a newer transformers."
    )


def _named_weights(place: Place) -> str | None:
    config = place.file(CONFIG)
    named = json.loads(config.read_text(encoding="utf-8")).get("transformers_weights") if config is not None else None
    return named if isinstance(named, str) else None


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # a file of before 2020, which can't be mapped
        state = torch.load(file, map_location="cpu", weights_only=True)
    return state

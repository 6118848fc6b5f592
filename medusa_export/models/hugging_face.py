"""Checkpoints in Hugging Face's layout: a folder or a hub id, with safetensors or PyTorch files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from medusa_export.common.errors import CheckpointError
from medusa_export.models.checkpoint import Checkpoint, LoadedModel, Precision, StoredWeight, from_pretrained
from medusa_export.models.contents import open_contents, read
from medusa_export.models.files import CONFIG, Place, check_file, check_folder, weight_files
from medusa_export.models.quantized.methods import METHODS, unpacked

_GENERATION = "generation_config.json"
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
        if hasattr(config, "quantization_config"):  # the model is an ordinary one
            del config.quantization_config
        return config

    def load(self, config: PreTrainedConfig, precision: Precision) -> LoadedModel:
        files = weight_files(self.place, getattr(config, "transformers_weights", None))
        packing = _packing(self.place)
        if packing is None:
            return from_pretrained(config, precision, self.path)
        loaded = from_pretrained(config, precision, state_dict=unpacked(open_contents(files), packing))
        if self.place.file(_GENERATION) is not None:
            loaded.model.generation_config = GenerationConfig.from_pretrained(self.path)
        return loaded

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        found = [file for file in map(self.place.file, _TOKENIZER_FILES) if file is not None]
        for file in found:
            check_file(file)
        if not found:
            return None
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        return tokenizer

    def stored_weights(self, model: PreTrainedModel) -> Iterator[StoredWeight]:
        files, packing = weight_files(self.place, _named_weights(self.place)), _packing(self.place)
        if packing is not None:
            for name, tensor in unpacked(open_contents(files), packing).items():
                yield StoredWeight(name, None, tensor[...])
            return
        for file in files:
            for name, tensor in open_contents([file]).tensors.items():
                yield StoredWeight(name, None, read(tensor))


def _check_settings(source: str, file: Path) -> None:
    """Refuses a model whose weights are packed, or whose architecture transformers doesn't have."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"The config.json of {source} is not valid JSON ({e}): restore the file.") from e
    if not isinstance(settings, dict):
        raise CheckpointError(f"The config.json of {source} holds no settings: restore the file.")
    packed = settings.get("quantization_config") or settings.get("compression_config")
    method = packed.get("quant_method") if isinstance(packed, dict) else None
    if packed and method not in METHODS:
        raise CheckpointError(
            f"{source} holds weights packed by {method or 'a quantizer'} (quantization_config in its {CONFIG}), which "
            f"can't be read; those that can be read are {', '.join(METHODS)}. Give the model that it was made from, "
            "with weights in fp32, fp16 or bf16."
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
    named = _settings(place).get("transformers_weights")
    return named if isinstance(named, str) else None


def _packing(place: Place) -> Mapping[str, Any] | None:
    """The settings of the quantizer that packed a checkpoint's weights; None if they aren't packed."""
    settings = _settings(place)
    return settings.get("quantization_config") or settings.get("compression_config")


def _settings(place: Place) -> dict[str, Any]:
    config = place.file(CONFIG)
    settings: dict[str, Any] = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
    return settings

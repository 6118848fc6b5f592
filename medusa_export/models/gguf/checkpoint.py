"""Checkpoints in GGUF, the file format of llama.cpp. Weights are dequantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from medusa_export.compat.gguf import gguf_cache, open_gguf
from medusa_export.compat.lazy_loading import weights_left_in_files
from medusa_export.compat.transformers import model_class
from medusa_export.models.checkpoint import (
    Checkpoint,
    LoadedModel,
    Precision,
    StoredWeight,
    from_pretrained,
    left_in_files,
)
from medusa_export.models.files import GGUF_MAGIC, Place
from medusa_export.models.gguf.metadata import Metadata
from medusa_export.models.gguf.settings import apply_settings, check_readable
from medusa_export.models.gguf.tensors import stored_tensors, unread_tensors
from medusa_export.models.gguf.tokenizer import complete_tokenizer

_TOKENS = "tokenizer.ggml.tokens"


class GgufCheckpoint(Checkpoint):
    """A model in a single GGUF file."""

    suffixes = (".gguf",)

    @classmethod
    def recognizes(cls, place: Place) -> bool:
        file = place.single_file
        return file is not None and (file.suffix.lower() in cls.suffixes or _starts_as_gguf(file))

    @property
    def file(self) -> Path:
        """The GGUF file."""
        assert self.place.single_file is not None
        return self.place.single_file

    def reading(self) -> AbstractContextManager[None]:
        return gguf_cache()

    def config(self) -> PreTrainedConfig:
        metadata = Metadata.of(self.place.source, open_gguf(self.file))
        check_readable(metadata)
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            self.file.parent, gguf_file=self.file.name, trust_remote_code=False
        )
        return apply_settings(config, metadata)

    def load(self, config: PreTrainedConfig, precision: Precision) -> LoadedModel:
        # With dequantize=True transformers gives an ordinary model, without a quantizer.
        dequantize = GgufConfig(dequantize=True)
        loaded = from_pretrained(
            config, precision, str(self.file.parent), gguf_file=self.file.name, quantization_config=dequantize
        )
        # transformers does not report tensors that it has no place for.
        return replace(loaded, unread=frozenset(unread_tensors(open_gguf(self.file), loaded.model)))

    def open(self, config: PreTrainedConfig, precision: Precision) -> LoadedModel:
        # transformers dequantizes the whole file at once. Here each tensor is dequantized when it is read.
        reader = open_gguf(self.file)
        with torch.device("meta"):
            names = model_class(config)(config)
        state = {tensor.weight: tensor for tensor in stored_tensors(reader, names) if tensor.weight is not None}
        with weights_left_in_files() as left:
            loaded = from_pretrained(config, precision, state_dict=state)
        loaded = replace(loaded, unread=frozenset(unread_tensors(reader, loaded.model)))
        return left_in_files(loaded, left, precision)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        reader: Any = open_gguf(self.file)
        if _TOKENS not in reader.fields:
            return None
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.file.parent, gguf_file=self.file.name, trust_remote_code=False
        )
        complete_tokenizer(tokenizer, reader, self.place.source)
        return tokenizer

    def stored_weights(self, model: PreTrainedModel) -> Iterator[StoredWeight]:
        for tensor in stored_tensors(open_gguf(self.file), model):
            yield StoredWeight(tensor.name, tensor.weight, tensor[...])

    def explain(self, problem: str) -> str:
        return f"the file ends too early: {problem}" if "buffer" in problem else problem


def _starts_as_gguf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(GGUF_MAGIC)) == GGUF_MAGIC

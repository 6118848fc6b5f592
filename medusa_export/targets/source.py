"""A model to export: one that is read from files, or one that is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_export.common import defaults
from medusa_export.common.dtypes import Dtype, torch_name
from medusa_export.common.errors import OptionError
from medusa_export.compat.transformers import attention_of, is_larger
from medusa_export.models.checkpoint import Readers, readers_by_weight
from medusa_export.models.checkpoints import check_fast, load_tokenizer, model_name, open_model, reading
from medusa_export.models.packed import StoredBlocks
from medusa_export.models.supported import check_supported
from medusa_export.models.text_model import text_model
from medusa_export.step.attention import ATTENTION_NAME


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        model: The model; its attention is the step's.
        tokenizer: Its tokenizer; None for a bundle without one.
        path: The folder, file or hub id that it was read from; None for a loaded model.
        name: The model's name.
        readers: Functions that read the weights that are placeholders in the model, by the weights' names.
        blocks: The weights among these that the files hold in blocks of integers, by name.
        packed: The storage, in words, of the weights among these that are dequantized when they are read, by name.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    path: str | None
    name: str
    readers: Readers = field(default_factory=dict)
    blocks: Mapping[str, StoredBlocks] = field(default_factory=dict)
    packed: Mapping[str, str] = field(default_factory=dict)

    @property
    def lm_head_reader(self) -> Callable[[], Tensor] | None:
        """The function that reads the model's output projection; None if it is in memory."""
        return readers_by_weight(self.model, self.readers).get(id(self.model.get_output_embeddings().weight))


@contextmanager
def opened_source(
    model: str | PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: Dtype | None,
    *,
    with_tokenizer: bool,
    text_only: bool,
) -> Iterator[Source]:
    """Opens a model for export while a block lasts. A loaded model is as before when the block ends.

    Args:
        model: A folder, a hub id, the path of a ``.gguf`` file, or a loaded model.
        tokenizer: The tokenizer of a loaded model, if it has one.
        dtype: Type that the bundle computes in; None for that of a loaded model, and the default for one that is read.
        with_tokenizer: Read the tokenizer of a model that is read.
        text_only: Take the text model out of a larger one.

    Raises:
        OptionError: An argument does not fit a loaded model, or one that is read.
        CheckpointError: The model or its tokenizer can't be read.
        ModelNotSupportedError: The decoding step does not support a feature of the model.
    """
    if isinstance(model, PreTrainedModel):
        if dtype is not None and torch_name(dtype) != str(model.dtype).removeprefix("torch."):
            raise OptionError(f"The loaded model is {model.dtype}, not {dtype}: convert it, or leave dtype out.")
        if text_only and is_larger(model.config):
            model = text_model(model)
        check_supported(model)
        with _prepared(model):
            yield Source(
                model, _fast(tokenizer), None, model_name(model.name_or_path) if model.name_or_path else "model"
            )
        return
    if tokenizer is not None:
        raise OptionError("A model that is read brings its own tokenizer: leave tokenizer out, or load the model.")
    path = fspath(model)
    with reading(path):
        opened = open_model(
            path,
            dtype=getattr(torch, torch_name(dtype or defaults.EXPORT_DTYPE)),
            attn_implementation=ATTENTION_NAME,
            text_only=text_only,
        )
        check_supported(opened.model)
        read = _fast(load_tokenizer(path)) if with_tokenizer else None
        yield Source(opened.model, read, path, model_name(path), opened.readers, opened.blocks, opened.packed)


def _fast(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    if tokenizer is not None:
        check_fast(tokenizer)
    return tokenizer


@contextmanager
def _prepared(model: PreTrainedModel) -> Iterator[None]:
    """Sets a loaded model to evaluation and to the step's attention while the block lasts."""
    if model.device.type != "cpu":
        raise OptionError(f"The loaded model is on {model.device}: move it to the CPU with model.to('cpu').")
    loaded: Any = model
    was_training, attention = model.training, attention_of(model)
    loaded.set_attn_implementation(ATTENTION_NAME)
    model.eval()
    try:
        yield
    finally:
        loaded.set_attn_implementation(attention)
        model.train(was_training)

"""Load base models and their tokenizers from checkpoints, and write them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from medusa_export.common.errors import CheckpointError, MissingExtraError, ModelNotSupportedError, OutputError
from medusa_export.common.files import WRITE_ERRORS, atomic_folder
from medusa_export.compat.transformers import has_causal_lm, is_larger, model_class, quiet_libraries
from medusa_export.models.checkpoint import Checkpoint, LoadedModel, Precision, StoredWeight
from medusa_export.models.completeness import check_complete
from medusa_export.models.formats import open_checkpoint
from medusa_export.models.supported import check_supported, several_models
from medusa_export.models.text_model import read_weights, text_model, text_part


def load_model(
    source: str, *, dtype: torch.dtype, attn_implementation: str | None = None, text_only: bool = False
) -> PreTrainedModel:
    """Loads a base model onto the CPU, in eval mode and without gradients.

    Of a merged Medusa-2 checkpoint it loads the base model; ``medusa_export.heads.files.load_heads`` loads the heads.

    Args:
        source: A folder in Hugging Face's layout, a hub id, or a file of a registered format, such as GGUF.
        dtype: The type of the loaded weights.
        attn_implementation: A name registered with transformers' ``AttentionInterface``; its own choice if None.
        text_only: Load the text model alone, if the source holds a larger model, such as one for images and text.

    Raises:
        CheckpointError: The model is missing, unreachable, unreadable, incomplete or of an unknown architecture.
        MissingExtraError: A library that dequantizes its weights is not installed.
        ModelNotSupportedError: It is an encoder-decoder, or a larger model without ``text_only``; with
            ``attn_implementation``, also if a step can't honour it.
    """
    return _load(source, Precision(dtype, attn_implementation), text_only=text_only).model


def open_model(
    source: str, *, dtype: torch.dtype, attn_implementation: str | None = None, text_only: bool = False
) -> LoadedModel:
    """Loads a base model as ``load_model`` does, but leaves its weights in the files until they are asked for.

    Args:
        source: As for ``load_model``.
        dtype: The type of the weights once they are read.
        attn_implementation: As for ``load_model``.
        text_only: As for ``load_model``.

    Returns:
        The model with placeholders, and the functions that read the weights. They raise any error of any library if a
        file is damaged or removed by then.

    Raises:
        CheckpointError: As for ``load_model``.
        MissingExtraError: As for ``load_model``.
        ModelNotSupportedError: As for ``load_model``.
    """
    return _load(source, Precision(dtype, attn_implementation), leave_weights=True, text_only=text_only)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a base model, or None if it has none.

    Args:
        source: As for ``load_model``.

    Raises:
        CheckpointError: The source is missing or unreachable, or its tokenizer can't be read.
    """
    with _loading(source, "tokenizer") as checkpoint:
        return checkpoint.tokenizer()


def stored_weights(source: str, model: PreTrainedModel) -> Iterator[StoredWeight]:
    """Each tensor of a checkpoint's files, read without the code that loads models.

    Args:
        source: As for ``load_model``.
        model: The model that was loaded from it.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    checkpoint = open_checkpoint(source)
    with checkpoint.reading():
        yield from checkpoint.stored_weights(model)


def reading(source: str) -> AbstractContextManager[None]:
    """A context in which loading model and tokenizer of a source parses each file once."""
    return open_checkpoint(source).reading()


def model_name(source: str) -> str:
    """A name for a model, from its path or hub id."""
    return open_checkpoint(source).place.name


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that transformers has in Python only: it can't be written as a ``tokenizer.json``.

    Raises:
        CheckpointError: The tokenizer has no fast version.
    """
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"The tokenizer {type(tokenizer).__name__} can't be written as a tokenizer.json, which the runtime needs, "
            "since transformers has no fast version of it: export with "
            "`with_tokenizer=False`, and give and take token ids."
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes ``tokenizer.json`` and transformers' other files of a tokenizer, such as the chat template.

    Raises:
        CheckpointError: As for ``check_fast``.
    """
    check_fast(tokenizer)
    with quiet_libraries():
        tokenizer.save_pretrained(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a model and its tokenizer in Hugging Face's layout. A model that is there is replaced.

    Raises:
        OutputError: It can't be written.
    """
    try:
        with atomic_folder(folder) as partial, quiet_libraries():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    except WRITE_ERRORS as error:
        raise OutputError(f"The model can't be written to {folder}: {error}.") from error


@contextmanager
def _loading(source: str, part: str) -> Iterator[Checkpoint]:
    """Opens a checkpoint. An error of any library inside the block becomes a ``CheckpointError``.

    Args:
        source: As for ``load_model``.
        part: The part that is loaded, for messages.
    """
    checkpoint = open_checkpoint(source)
    with quiet_libraries(), checkpoint.reading():
        try:
            checkpoint.check()
            yield checkpoint
        except (CheckpointError, MissingExtraError, ModelNotSupportedError, MemoryError):
            raise
        except ImportError as e:
            words = " ".join(str(e).split())
            raise CheckpointError(f"The {part} of {source} needs a library that is not installed: {words}") from e
        # transformers and the libraries below it raise all kinds of errors for a damaged file.
        except Exception as e:
            raise CheckpointError(_reason(checkpoint, part, e)) from e


def _load(source: str, precision: Precision, *, leave_weights: bool = False, text_only: bool = False) -> LoadedModel:
    with _loading(source, "model") as checkpoint:
        config = checkpoint.config()
        _check_decoder(source, config)
        takes_part = text_only and is_larger(config)
        if is_larger(config) and not takes_part:
            raise ModelNotSupportedError(several_models(model_class(config).__name__))
        if precision.attention is not None:
            _check_skeleton(config)
        # Of a larger model only the weights of the text model are read.
        loaded = (checkpoint.open if leave_weights or takes_part else checkpoint.load)(config, precision)
        if takes_part:
            loaded = text_part(loaded)
        check_complete(source, loaded)
        if takes_part and not leave_weights:
            loaded = read_weights(loaded)
    loaded.model.eval().requires_grad_(False)
    return loaded


def _check_skeleton(config: PreTrainedConfig) -> None:
    """Refuses a model that a step can't honour, before its weights are read."""
    build: Any = model_class(config)
    with torch.device("meta"):
        skeleton: PreTrainedModel = build(config)
    check_supported(text_model(skeleton) if is_larger(config) else skeleton)


def _check_decoder(source: str, config: PreTrainedConfig) -> None:
    """Refuses a configuration that is not that of a causal language model."""
    if config.is_encoder_decoder:
        raise ModelNotSupportedError("an encoder besides its decoder")
    if not has_causal_lm(config):
        raise CheckpointError(
            f"{source} holds a model of type {config.model_type!r}, for which transformers has no causal "
            "language model: give a decoder."
        )


def _reason(checkpoint: Checkpoint, part: str, error: Exception) -> str:
    place = checkpoint.place
    words = " ".join(str(error).split()) or type(error).__name__
    if place.is_remote:
        return (
            f"{place.source} is not a local folder, and its {part} could not be had from the hub ({words}): check the "
            "name and the connection, or give a folder."
        )
    return (
        f"The {part} of {place.source} could not be read ({checkpoint.explain(words)}): the files are damaged, "
        "incomplete or of another kind."
    )

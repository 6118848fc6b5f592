"""Base models: from a folder, the hub or a GGUF file to a model in memory, and its tokenizer."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from logging import ERROR
from pathlib import Path
from typing import Any

import huggingface_hub.utils.logging as hub_logging
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from medusa_export.common.errors import CheckpointError, ModelNotSupportedError, OutputError
from medusa_export.common.files import WRITE_ERRORS, atomic_folder
from medusa_export.models.files import CONFIG, Place, check_file, check_folder, weight_files
from medusa_export.models.gguf.cache import gguf_cache, open_gguf
from medusa_export.models.gguf.settings import Metadata, apply_settings, check_readable
from medusa_export.models.gguf.tensors import unread_tensors
from medusa_export.models.gguf.tokenizer import complete_tokenizer
from medusa_export.models.supported import check_supported

# A model has a tokenizer if it has one of these.
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

# Tensors of MEDUSA heads that were merged into a model; ``head_files`` reads them.
HEADS = re.compile(r"(^|\.)medusa_heads?\.")
# What quantizers add to a weight.
_PACKED = re.compile(
    r"(qweight|qzeros|g_idx|scales?|scale_inv|weight_scale_2|input_scale|zero_point|weight_packed|weight_shape|absmax|"
    r"quant_map|quant_state\..*|SCB|W_q|meta|codebooks?|codes)$"
)


def load_model(source: str, *, dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel:
    """Loads a base model onto the CPU, in eval mode and without gradients.

    A merged Medusa-2 checkpoint loads as its base; its heads are ``head_files.load_heads``'s.

    Args:
        source: A folder in Hugging Face's layout, a hub id, or the path of a ``.gguf`` file, which is dequantized.
        dtype: What the weights become.
        attn_implementation: A name registered with transformers' ``AttentionInterface``; its own choice if None.

    Raises:
        CheckpointError: The model is missing, unreachable, unreadable, incomplete or of an unknown architecture.
        ModelNotSupportedError: It is an encoder-decoder; with ``attn_implementation``, also if the step can't serve it.
    """
    with _loading(source, "model") as place:
        config = _config(place)
        auto: Any = AutoModelForCausalLM  # typed as if it returned the model alone
        if attn_implementation is not None:
            with torch.device("meta"):  # no weights yet: what can't be served is refused before they are read
                check_supported(auto.from_config(config))
        # Asked to dequantize, transformers leaves an ordinary model: no quantization_config, no quantizer.
        options = {"quantization_config": GgufConfig(dequantize=True)} if place.gguf is not None else {}
        if place.gguf is None:
            weight_files(place, getattr(config, "transformers_weights", None))
        model, info = auto.from_pretrained(
            **place.arguments,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that it is reported below, with names
            output_loading_info=True,
            **options,
        )
        if place.gguf is not None:  # transformers passes over a tensor that it has no place for
            info["unexpected_keys"] = unread_tensors(open_gguf(place.gguf), model)
        _check_complete(source, info)
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a base model, or None if it has none.

    Args:
        source: As for ``load_model``.

    Raises:
        CheckpointError: The source is missing or unreachable, or its tokenizer can't be read.
    """
    with _loading(source, "tokenizer") as place:
        if not _has_tokenizer(place):
            return None
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**place.arguments, trust_remote_code=False)
        if place.gguf is not None:
            complete_tokenizer(tokenizer, open_gguf(place.gguf), source)
        return tokenizer


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that transformers implements in Python only, and so can't convert to a ``tokenizer.json``.

    Raises:
        CheckpointError: The tokenizer is of that kind.
    """
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"The tokenizer {type(tokenizer).__name__} can't be written as a tokenizer.json, which the runtime needs, "
            "since transformers has no fast version of it: export with --no-tokenizer, and give and take token ids."
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes ``tokenizer.json`` and what else transformers keeps beside it, the chat template among it.

    Raises:
        CheckpointError: As for ``check_fast``.
    """
    check_fast(tokenizer)
    with quiet_libraries():
        tokenizer.save_pretrained(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a model in Hugging Face's layout, its tokenizer beside it; a model that is there is replaced.

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
def _loading(source: str, what: str) -> Iterator[Place]:
    """Finds a source and has it read; what fails inside becomes a ``CheckpointError``."""
    place = Place.of(source)
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        if place.gguf is not None:
            stack.enter_context(gguf_cache())
        try:
            if place.gguf is None:
                check_folder(place)
            yield place
        except (CheckpointError, ModelNotSupportedError, MemoryError):
            raise
        # transformers and the readers below it raise all kinds of errors for a damaged or foreign file.
        except Exception as e:
            raise CheckpointError(_reason(place, what, e)) from e


def _config(place: Place) -> PreTrainedConfig:
    """The configuration, of a kind that has a causal language model."""
    metadata = None
    if place.gguf is not None:
        metadata = Metadata.of(place.source, open_gguf(place.gguf))
        check_readable(metadata)
    file = place.file(CONFIG)
    if file is not None:
        _check_settings(place.source, file)
    config: PreTrainedConfig = AutoConfig.from_pretrained(**place.arguments, trust_remote_code=False)
    if metadata is not None:
        config = apply_settings(config, metadata)
    if config.is_encoder_decoder:
        raise ModelNotSupportedError("an encoder besides its decoder")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(
            f"{place.source} holds a model of type {config.model_type!r}, for which transformers has no causal "
            "language model: give a decoder."
        )
    return config


def _check_settings(source: str, file: Path) -> None:
    """Refuses a model whose weights are packed, or whose architecture transformers doesn't know."""
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


def _check_complete(source: str, info: dict[str, Any]) -> None:
    """Refuses a model that would be partly random, or a checkpoint of which a part would be left out."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"The weight {name} of {source} has the shape {list(found)}, but its config.json asks for "
            f"{list(expected)}: the two belong to different models."
        )
    unread = sorted(name for name in info["unexpected_keys"] if not HEADS.search(name))
    if unread:
        raise CheckpointError(unread_weights(source, unread))
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"The checkpoint {source} lacks the weight {missing[0]}{more}, which would be random: get a complete one."
        )


def unread_weights(source: str, names: list[str]) -> str:
    """The sentence about tensors that the model has no place for."""
    few = ", ".join(names[:3])
    words = f"{len(names)} tensors of {source}" if len(names) > 1 else f"A tensor of {source}"
    words += f" would be left out, since its configuration has no place for {'them' if len(names) > 1 else 'it'}: {few}"
    words += f" and {len(names) - 3} more. " if len(names) > 3 else ". "
    if any(".lora_" in name or name.startswith("base_model.model.") for name in names):
        return (
            words
            + "Such names belong to a LoRA adapter within the weights: merge it into them (peft: merge_and_unload)."
        )
    if any(_PACKED.search(name) for name in names):
        return words + "Such names belong to packed weights: give the model with weights in fp32, fp16 or bf16."
    if all(name.endswith(".bias") for name in names):
        return words + "They are biases: correct the settings in its config.json that say which layers have one."
    return words + "Correct its config.json, or get the checkpoint that belongs to it."


def _has_tokenizer(place: Place) -> bool:
    if place.gguf is not None:
        return "tokenizer.ggml.tokens" in open_gguf(place.gguf).fields
    found = [file for file in map(place.file, _TOKENIZER_FILES) if file is not None]
    for file in found:
        check_file(file)
    return bool(found)


def _reason(place: Place, what: str, error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    if place.is_remote:
        return (
            f"{place.source} is not a local folder, and its {what} could not be had from the hub ({words}): check the "
            "name and the connection, or give a folder."
        )
    if place.gguf is not None and isinstance(error, (ValueError, IndexError)) and "buffer" in words:
        words = f"the file ends too early: {words}"
    return (
        f"The {what} of {place.source} could not be read ({words}): the files are damaged, incomplete or of another "
        "kind."
    )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps what transformers and the hub report, warn of and show as progress off the terminal."""
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars: Any = logging  # its functions are not annotated
    had_bars = bars.is_progress_bar_enabled()
    gguf_utils: Any = modeling_gguf_pytorch_utils
    bar = gguf_utils.tqdm  # used there without a look at transformers' setting
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity(ERROR)
        hub_logging.set_verbosity(ERROR)
        bars.disable_progress_bar()
        gguf_utils.tqdm = partial(bar, disable=True)
        try:
            yield
        finally:
            gguf_utils.tqdm = bar
            if had_bars:
                bars.enable_progress_bar()
            hub_logging.set_verbosity(hub_verbosity)
            logging.set_verbosity(verbosity)

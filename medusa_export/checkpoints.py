"""Base models: from a folder, the hub or a GGUF file to a model in memory, and its tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
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
from transformers.utils.hub import cached_file

from medusa_export.errors import CheckpointError, ModelNotSupportedError, OutputError
from medusa_export.files import WRITE_ERRORS, atomic_folder
from medusa_export.gguf_cache import gguf_cache

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


def load_model(source: str, *, dtype: torch.dtype, attn_implementation: str | None = None) -> PreTrainedModel:
    """Loads a base model onto the CPU, in eval mode and without gradients.

    A merged Medusa-2 checkpoint loads as its base; its heads are ``head_files.load_heads``'s.

    Args:
        source: A folder in Hugging Face's layout, a hub id, or the path of a ``.gguf`` file, which is dequantized.
        dtype: What the weights become.
        attn_implementation: A name registered with transformers' ``AttentionInterface``; its own choice if None.

    Raises:
        CheckpointError: The model is missing, unreachable, unreadable, incomplete or of an unknown architecture.
        ModelNotSupportedError: It is an encoder-decoder.
    """
    with _loading(source, "model") as place:
        config = _config(source, place)
        # Asked to dequantize, transformers leaves an ordinary model: no quantization_config, no quantizer.
        options = {"gguf_file": place["gguf_file"], "quantization_config": GgufConfig(dequantize=True)}
        auto: Any = AutoModelForCausalLM  # typed as if it returned the model alone
        model, info = auto.from_pretrained(
            place["pretrained_model_name_or_path"],
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that it is reported below, with names
            output_loading_info=True,
            **(options if place["gguf_file"] else {}),
        )
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
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
        return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes ``tokenizer.json`` and what else transformers keeps beside it, the chat template among it.

    Raises:
        CheckpointError: The tokenizer is implemented in Python only and so has no ``tokenizer.json``.
    """
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"The tokenizer {type(tokenizer).__name__} can't be written as a tokenizer.json, which the runtime needs: "
            "use a model whose tokenizer has a fast version."
        )
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
def _loading(source: str, what: str) -> Iterator[dict[str, Any]]:
    """Gives ``from_pretrained``'s arguments for a source; what fails inside becomes a ``CheckpointError``."""
    with ExitStack() as stack:
        place = _place(source)
        stack.enter_context(quiet_libraries())
        if place["gguf_file"]:
            stack.enter_context(gguf_cache())
        try:
            yield place
        except (CheckpointError, ModelNotSupportedError, MemoryError):
            raise
        # transformers and the readers below it raise all kinds of errors for a damaged or foreign file.
        except Exception as e:
            raise CheckpointError(_reason(source, what, place, e)) from e


def _place(source: str) -> dict[str, Any]:
    """Where a source lies: ``pretrained_model_name_or_path`` and ``gguf_file``, None where it is no GGUF."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"There is no file {source}: give the path of a GGUF file, a folder or a hub id.")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_file():
        raise CheckpointError(f"{source} is a file that is no GGUF: give the folder of a model, or a .gguf file.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(_no_config(source, path))
        return {"pretrained_model_name_or_path": str(path), "gguf_file": None}
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise CheckpointError(f"There is no folder {source}: give a model's folder, a .gguf file, or a hub id.")
    return {"pretrained_model_name_or_path": source, "gguf_file": None}


def _no_config(source: str, folder: Path) -> str:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"{source} has no config.json, but holds {ggufs[0].name}: give the path of that file."
    return f"{source} has no config.json, so it is not a model's folder: give one that transformers can load."


def _config(source: str, place: dict[str, Any]) -> PreTrainedConfig:
    """The configuration, of a kind that has a causal language model."""
    if place["gguf_file"] is None and Path(place["pretrained_model_name_or_path"]).is_dir():
        _check_model_type(source, Path(place["pretrained_model_name_or_path"]) / "config.json")
    config: PreTrainedConfig = AutoConfig.from_pretrained(**place, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ModelNotSupportedError("an encoder besides its decoder")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(
            f"{source} holds a model of type {config.model_type!r}, for which transformers has no causal language "
            "model: give a decoder."
        )
    return config


def _check_model_type(source: str, file: Path) -> None:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CheckpointError(f"The config.json of {source} is not valid JSON ({e}): restore the file.") from e
    if not isinstance(settings, dict):
        raise CheckpointError(f"The config.json of {source} holds no settings: restore the file.")
    kind = settings.get("model_type")
    if kind in CONFIG_MAPPING:
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
    """Refuses a model that would be partly random."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"The weight {name} of {source} has the shape {list(found)}, but its config.json asks for "
            f"{list(expected)}: the two belong to different models."
        )
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"The checkpoint {source} lacks the weight {missing[0]}{more}, which would be random: get a complete one."
        )


def _has_tokenizer(place: dict[str, Any]) -> bool:
    if place["gguf_file"]:
        gguf: Any = import_module("gguf")  # only here, since folders load without it
        path = Path(place["pretrained_model_name_or_path"]) / place["gguf_file"]
        return "tokenizer.ggml.tokens" in gguf.GGUFReader(path).fields
    name = place["pretrained_model_name_or_path"]
    cached_file(name, "config.json")  # raises where the model can't be reached; below, that would read as "none"
    return any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in _TOKENIZER_FILES)


def _reason(source: str, what: str, place: dict[str, Any], error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    if place["gguf_file"] is None and not Path(place["pretrained_model_name_or_path"]).is_dir():
        return (
            f"{source} is not a local folder, and its {what} could not be had from the hub ({words}): check the name "
            "and the connection, or give a folder."
        )
    if place["gguf_file"] and isinstance(error, (ValueError, IndexError)) and "buffer" in words:
        words = f"the file ends too early: {words}"
    return f"The {what} of {source} could not be read ({words}): the files are damaged, incomplete or of another kind."


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

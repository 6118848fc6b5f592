"""The tensors in a checkpoint's files, read one by one and without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from medusa_export.models.files import CONFIG, Place, weight_files
from medusa_export.models.gguf.cache import gguf_cache, open_gguf
from medusa_export.models.gguf.tensors import stored_tensors


def stored_weights(place: Place, model: PreTrainedModel) -> Iterator[tuple[str, str | None, Tensor]]:
    """Each tensor of a checkpoint, in no certain order.

    Args:
        place: Where the checkpoint lies.
        model: The model that was loaded from it. Its names and sizes are needed to read a GGUF file.

    Yields:
        The tensor's name in the file; the name of the model's weight, or None where the file's own name tells; and the
        values, as stored.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    if place.gguf is not None:
        with gguf_cache():
            for name, weight, values in stored_tensors(open_gguf(place.gguf), model):
                yield name, weight, torch.tensor(values)
        return
    for file in weight_files(place, _named_weights(place)):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no dictionary
                    yield name, None, opened.get_tensor(name)
        else:
            for name, tensor in _unpickled(file).items():
                yield name, None, tensor


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

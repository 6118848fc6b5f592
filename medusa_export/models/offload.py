"""Keeps the weights of a model in files, for models that don't fit in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_export.common.errors import OutputError
from medusa_export.common.progress import BYTES, OnProgress, Task
from medusa_export.models.checkpoint import LoadedModel, readers_by_weight


def offload(loaded: LoadedModel, folder: Path, on_progress: OnProgress) -> PreTrainedModel:
    """Moves the weights of a model to files in fp32, which are mapped into memory: the system reads what is used.

    Changes of the weights change the files. The files may be deleted while the model is used.

    Args:
        loaded: A model whose weights may still be in the files of its checkpoint. They are read one by one.
        folder: The folder to write to. It needs four bytes per weight.
        on_progress: Receives reports.

    Raises:
        OutputError: The folder can't be written, or its disk has too little space.
    """
    weights = {id(weight): weight for weight in loaded.model.parameters()}
    names = {id(weight): name for name, weight in loaded.model.named_parameters(remove_duplicate=False)}
    readers = readers_by_weight(loaded.model, loaded.readers)
    size = 4 * sum(weight.numel() for weight in weights.values())
    task = Task("writing weights of the reference", size, on_progress, unit=BYTES)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"The weights of the reference can't be written to {folder}: {error}.") from error
    if free < size:
        raise OutputError(
            f"The weights of the reference take {size / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free: "
            "give a folder on another disk."
        )
    written = 0
    for key, weight in weights.items():
        read = readers.get(key)
        weight.data = _mapped(weight.detach() if read is None else read(), folder / names[key])
        written += 4 * weight.numel()
        task.reach(written)
    return loaded.model


def _mapped(values: Tensor, file: Path) -> Tensor:
    """Writes numbers to a file, and maps it into memory."""
    numbers = values.float().contiguous()
    if not numbers.numel():
        return numbers
    try:
        numbers.numpy().tofile(file)
    except OSError as error:
        raise OutputError(f"The weights of the reference can't be written to {file.parent}: {error}.") from error
    return torch.from_file(str(file), shared=True, size=numbers.numel(), dtype=torch.float32).view(numbers.shape)

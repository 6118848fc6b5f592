"""Quantizes a model with GPTQ: ``medusa_export.quantize``."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import nn

from medusa_export.common import defaults
from medusa_export.common.dtypes import INTEGER_TYPES, Dtype, IntegerType
from medusa_export.common.errors import OptionError
from medusa_export.common.files import check_target
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.models.blocks import Bits, BlockWeight
from medusa_export.models.checkpoints import load_model
from medusa_export.models.text_model import check_stands_alone
from medusa_export.models.weight_types import WeightTypes
from medusa_export.quantization.checkpoint import save_quantized
from medusa_export.quantization.gptq import gptq
from medusa_export.quantization.layers import LinearInputs, for_each_linear
from medusa_export.training.dataset import load_split
from medusa_export.training.device import device_of, dtype_of
from medusa_export.training.templates import load_chat_tokenizer

_CONFIG = "config.json"


def quantize(
    model: str | PathLike[str],
    output: str | PathLike[str],
    data: Sequence[str | PathLike[str]],
    *,
    weights: IntegerType = defaults.QUANTIZED_WEIGHTS,
    wide: Sequence[str] = (),
    block_size: int = defaults.BLOCK_SIZE,
    smoothing: bool = True,
    max_length: int = defaults.QUALITY_LENGTH,
    limit: int | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    overwrite: bool = False,
    text_only: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> dict[str, BlockWeight]:
    """Quantizes the linear layers of a model's decoder layers with GPTQ, and writes a compressed-tensors checkpoint.

    ``export`` with ``weights`` stores its integers as they are. Embeddings and the output projection stay as they are
    in the checkpoint.

    Args:
        model: A folder in Hugging Face's layout, a hub id, or the path of a ``.gguf`` file. It needs a chat template.
        output: The folder to write. It appears whole or not at all.
        data: Conversations to calibrate on, best with the model's own answers: folders that ``distill`` wrote, of which
            the part for training is used, or files of conversations.
        weights: ``int4``, in blocks with zero points, or ``int8``, in blocks without.
        wide: The last parts of the names of modules that are int8 in any case, such as ``down_proj``.
        block_size: Columns that share a scale, a power of two.
        smoothing: Balance the sizes of columns between the inputs and the weights of linear layers first. The model
            computes the same, and products with integers lose less when they round their inputs.
        max_length: Largest number of tokens of a conversation; the rest is cut off.
        limit: Largest number of conversations; None for all.
        dtype: Type of the model's weights, and of the scales; bf16 on a GPU and fp32 elsewhere if None.
        device: The device to run on, such as ``cuda:1``; the GPU, if there is one, if None.
        overwrite: Replace a model that is at ``output``.
        text_only: Take the text model out of a larger one, such as one for images and text.
        on_progress: Receives reports.

    Returns:
        The quantized matrices, by the names of their modules.

    Raises:
        OptionError: The type, the block size or a name in ``wide`` is unknown.
        CheckpointError: The model can't be read.
        ModelNotSupportedError: The model's decoder layers hold no linear layers of PyTorch's.
        DatasetError: The data can't be read, or hold nothing to calibrate on.
        SettingsError: A folder of data was not written by ``distill``.
        ExportError: ``output`` holds other files, or a model and ``overwrite`` is not set.
        OutputError: The checkpoint can't be written.
    """
    if weights not in INTEGER_TYPES:
        raise OptionError(f"There is no type {weights!r} of integers: give one of {', '.join(INTEGER_TYPES)}.")
    types, target = WeightTypes.all(weights, block_size=block_size), Path(output)
    check_target(target, replace_existing=overwrite, marker=_CONFIG, noun="model")
    source, place = fspath(model), device_of(device)
    tokenizer = load_chat_tokenizer(source)
    read = load_split([Path(path) for path in data], "train").tokenized(tokenizer, max_length)
    read.warn_of_skipped(stacklevel=2)
    samples = [sample.cut(max_length) for part in read.samples["train"] for sample in part][:limit]
    on_progress(Progress(f"loading {source}"))
    kind = getattr(torch, dtype_of(dtype, place))
    base = load_model(source, dtype=kind, text_only=text_only).to(place)
    check_stands_alone(base)
    _check_wide(base, wide)
    found: dict[str, BlockWeight] = {}

    def rounded(linear: LinearInputs) -> None:
        weight = linear.module.weight
        size = types.block_for(weight.shape[1])
        if size is None:  # it keeps its dtype
            return
        bits: Bits = 8 if weights == "int8" or linear.name.rpartition(".")[2] in wide else 4
        made = gptq(weight, linear.hessian, bits, size, weight.dtype)
        weight.copy_(made.dequantized())
        found[linear.name] = made

    for_each_linear(base, samples, rounded, on_progress, smoothing=smoothing)
    on_progress(Progress(f"writing {target}"))
    save_quantized(base, tokenizer, found, target, replace_existing=overwrite)
    return found


def _check_wide(model: nn.Module, wide: Sequence[str]) -> None:
    """Refuses names that no linear layer has."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in wide:
        if name not in names:
            raise OptionError(f"No linear layer is named {name!r}: `wide` takes {', '.join(sorted(names))}.")

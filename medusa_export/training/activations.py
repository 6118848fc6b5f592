"""Measures the ranges of the inputs of a model's linear layers, over text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike, fspath
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common import defaults
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.models.activations import ActivationRanges, InputRange
from medusa_export.models.checkpoints import load_model, model_name
from medusa_export.training.conversations import Sample
from medusa_export.training.dataset import load_split
from medusa_export.training.device import device_of, dtype_of
from medusa_export.training.templates import load_chat_tokenizer


def activations(
    model: str | PathLike[str],
    data: Sequence[str | PathLike[str]],
    *,
    max_length: int = defaults.MAX_LENGTH,
    samples: int = defaults.ACTIVATION_SAMPLES,
    strict: bool = False,
    device: str | None = None,
    text_only: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> ActivationRanges:
    """Measures the ranges of the inputs of a model's linear layers, for an export with ``activations``.

    Args:
        model: The base model: a folder in Hugging Face's layout, a hub id, or the path of a ``.gguf`` file. It needs a
            chat template.
        data: Data sets: folders that ``distill`` wrote, whose part for training is used, or files of conversations. The
            held-out part is left for measuring the quality.
        max_length: Largest number of tokens of a conversation; the rest is cut off.
        samples: Largest number of conversations.
        strict: Refuse data with rows that can't be used, instead of leaving these rows out.
        device: The device to run on, such as ``cuda:1``; the GPU, if there is one, if None.
        text_only: Take the text model out of a larger one, such as one for images and text.
        on_progress: Receives reports.

    Returns:
        The ranges; ``save`` writes them to a file.

    Raises:
        CheckpointError: The model can't be read.
        DatasetError: The data can't be read.
        SettingsError: A folder of data was not written by ``distill``.
        OutputError: Raised by ``save``.
    """
    source, place = fspath(model), device_of(device)
    tokenized = load_split([Path(path) for path in data], "train").tokenized(
        load_chat_tokenizer(source), max_length, strict=strict
    )
    tokenized.warn_of_skipped(stacklevel=2)
    texts = [sample.cut(max_length) for part in tokenized.samples["train"] for sample in part][:samples]
    on_progress(Progress(f"loading {source}"))
    kind = getattr(torch, dtype_of(None, place))
    base = load_model(source, dtype=kind, text_only=text_only).to(place)
    return measured(base, texts, name=model_name(source), on_progress=on_progress)


def measured(
    model: PreTrainedModel, texts: Sequence[Sample], *, name: str = "", on_progress: OnProgress = ignore_progress
) -> ActivationRanges:
    """Measures the ranges of a loaded model, in two passes: maxima first, then errors of rounding.

    Args:
        model: The model.
        texts: Tokens of conversations.
        name: The model's name.
        on_progress: Receives reports.
    """
    maxima: dict[str, Tensor] = {}
    errors: dict[str, list[Tensor]] = defaultdict(list)

    def widen(layer: str, given: Tensor) -> None:
        found = given.abs().amax(0)
        maxima[layer] = torch.maximum(maxima[layer], found) if layer in maxima else found

    _run(model, texts, widen, "measuring activations", on_progress)
    ranges = {layer: InputRange(found.cpu()) for layer, found in maxima.items()}

    def compare(layer: str, given: Tensor) -> None:
        lost = (ranges[layer].rounded(given) - given).square().sum(-1)
        errors[layer].append((lost / given.square().sum(-1).clamp(min=1e-30)).cpu())

    _run(model, texts, compare, "measuring errors", on_progress)
    inputs = {layer: InputRange(one.maxima, float(torch.cat(errors[layer]).mean())) for layer, one in ranges.items()}
    return ActivationRanges(inputs, name, sum(len(text.input_ids) for text in texts))


@torch.inference_mode()
def _run(
    model: PreTrainedModel,
    texts: Sequence[Sample],
    see: Callable[[str, Tensor], None],
    what: str,
    on_progress: OnProgress,
) -> None:
    """Runs a model over texts, and passes the inputs [N, K] of each linear layer to ``see``, in fp32."""
    with _shown(model, see):
        for number, text in enumerate(texts):
            on_progress(Progress(what, number, len(texts)))
            model(torch.tensor([text.input_ids], device=model.device), use_cache=False)


@contextmanager
def _shown(model: PreTrainedModel, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls a function with the name of the weight and the input of each linear layer that runs in the block."""

    def hook_for(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: see(f"{layer}.weight", given[0].flatten(0, -2).float())

    with ExitStack() as hooks:
        for layer, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_pre_hook(hook_for(layer)))
        yield

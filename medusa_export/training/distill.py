"""Distillation in one call: a model writes the data that its heads are trained on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from os import PathLike, fspath
from pathlib import Path

import torch

from medusa_export.common.dtypes import Dtype
from medusa_export.common.errors import MedusaWarning
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.models.checkpoints import load_model
from medusa_export.training.device import device_of, dtype_of
from medusa_export.training.distillation import Distilled, write_dataset
from medusa_export.training.generation import Writer
from medusa_export.training.options import OWN_PROMPTS, DistillOptions
from medusa_export.training.part_writer import DistillSettings
from medusa_export.training.rows import Reading, check_skipped, facts, read_conversations, summary
from medusa_export.training.templates import load_chat_tokenizer
from medusa_runtime.bundles.listed_folder import FileFacts


def distill(
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    prompts: Sequence[str | PathLike[str]] = (),
    options: DistillOptions = DistillOptions(),
    strict: bool = False,
    dtype: Dtype | None = None,
    device: str | None = None,
    text_only: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Distilled:
    """Lets a model write training data: it answers prompts from files, or prompts that it writes itself.

    A job that was interrupted continues if it is started again with the same arguments. Rows and prompts that can't be
    used are left out with a ``MedusaWarning``.

    Args:
        model: A folder in Hugging Face's layout, a hub id, or the path of a ``.gguf`` file. It needs a chat template.
        output: The folder of the job. In the end ``train.jsonl`` and ``heldout.jsonl`` in it are the data.
        prompts: Files of prompts: ``.txt`` with one per line, or ``.json`` and ``.jsonl`` with ``messages``,
            ``conversations`` (ShareGPT), ``data`` (UltraChat) or ``prompt``.
        options: Options that shape the data.
        strict: Refuse files with rows that can't be used, instead of leaving these rows out.
        dtype: Type of the weights; bf16 on a GPU and fp32 elsewhere if None.
        device: The device to run on, such as ``cuda:1``; the GPU, if there is one, if None.
        text_only: Take the text model out of a larger one, such as one for images and text.
        on_progress: Receives reports.

    Returns:
        What was written, and what was left out.

    Raises:
        OptionError: The type is unknown.
        CheckpointError: The model can't be read.
        DatasetError: A file can't be read, there is nothing to answer, the folder holds other files, or the chat
            template doesn't fit.
        SettingsError: The folder's job began with other options or another model.
        OutputError: A file can't be written.
    """
    place = device_of(device)
    kind = dtype_of(dtype, place)
    source, paths = fspath(model), [Path(path) for path in prompts]
    read = _read(paths, strict=strict)
    if read.skipped:
        warnings.warn(summary(read.skipped, read.rows), MedusaWarning, stacklevel=2)
    settings = _settings(options, source, paths, kind)
    made = write_dataset(
        Path(output),
        settings,
        read.conversations,
        partial(_open_writer, source, kind, place, on_progress, text_only=text_only),
        found=facts(read.skipped, read.rows) if paths else None,
        strict=strict,
        on_progress=on_progress,
    )
    for text in _warnings(made, settings):
        warnings.warn(text, MedusaWarning, stacklevel=2)
    return made


def _read(paths: Sequence[Path], *, strict: bool) -> Reading:
    """Reads and joins all files of prompts."""
    readings = [read_conversations(path) for path in paths]
    conversations = [conversation for reading in readings for conversation in reading.conversations]
    read = Reading(conversations, [row for reading in readings for row in reading.skipped])
    check_skipped(read.skipped, read.rows, strict=strict)
    return read


def _settings(options: DistillOptions, model: str, prompts: Sequence[Path], dtype: str) -> DistillSettings:
    """The job's settings. Without files of prompts, the model writes ``OWN_PROMPTS`` prompts by default."""
    magpie = options.magpie if options.magpie is not None else 0 if prompts else OWN_PROMPTS
    files = [[path.name, FileFacts.of(path).sha256] for path in prompts]
    return DistillSettings(**{**asdict(options), "magpie": magpie}, model=Path(model).name, prompts=files, dtype=dtype)


def _open_writer(model: str, dtype: str, device: torch.device, on_progress: OnProgress, *, text_only: bool) -> Writer:
    """Loads the model."""
    on_progress(Progress(f"loading {model}"))
    tokenizer = load_chat_tokenizer(model)
    return Writer(load_model(model, dtype=getattr(torch, dtype), text_only=text_only).to(device), tokenizer)


def _warnings(made: Distilled, settings: DistillSettings) -> list[str]:
    """Returns sentences about prompts that are missing, and about answers that were cut off."""
    found = []
    if made.own_prompts < settings.magpie:
        found.append(
            f"The model wrote {made.own_prompts:,} of {settings.magpie:,} prompts, because it repeats itself or does "
            "not end its turns: raise `prompt_temperature`, or give `prompts`."
        )
    if made.left_out:
        found.append(
            f"{made.left_out:,} prompts are left out, because the model has no room for an answer of "
            f"{settings.max_new_tokens} tokens after them."
        )
    if made.refused:
        total = len(made.refused) + made.answers + made.left_out
        found.append(f"The chat template refuses some prompts: {summary(made.refused, total)}")
    if made.cut_off > made.answers // 2:
        found.append(
            f"{made.cut_off:,} of {made.answers:,} conversations were cut off at {settings.max_new_tokens} tokens of "
            "an answer. Raise `max_new_tokens`, in another folder, so that the heads see whole answers."
        )
    return found

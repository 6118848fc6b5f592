"""Training of heads in one call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_export.common import defaults
from medusa_export.common.dtypes import Dtype, torch_name
from medusa_export.common.errors import OptionError
from medusa_export.common.files import write_text
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.heads.base import DraftHeads
from medusa_export.models.checkpoints import load_model
from medusa_export.models.text_model import check_stands_alone
from medusa_export.training.dataset import TokenizedData, load_sources
from medusa_export.training.device import dtype_of
from medusa_export.training.job import History, TrainingJob
from medusa_export.training.joint import Lora
from medusa_export.training.options import HeadShape, TrainOptions
from medusa_export.training.processes import Processes
from medusa_export.training.report import held_out
from medusa_export.training.run import Schedule
from medusa_export.training.templates import load_chat_tokenizer

HISTORY = "training.json"


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        folder: The folder with the heads. The recipe ``medusa2`` also writes the changed model, to ``model`` in it.
        num_heads: Number of heads.
        histories: The log of each stage, ``training`` and ``joint``: losses by step, and figures on held-out
            conversations by epoch.
        is_main: True in the process that wrote the files.
    """

    folder: Path
    num_heads: int
    histories: Mapping[str, History]
    is_main: bool

    @property
    def heldout(self) -> dict[str, float]:
        """Figures on held-out conversations after the last epoch, such as ``loss`` and ``head1_top1``."""
        return held_out([*self.histories.values()][-1])[-1]

    @property
    def merged_perplexity(self) -> float | None:
        """Perplexity of held-out answers with LoRA merged into the model; None if the model was not trained."""
        joint = self.histories.get("joint")
        return None if joint is None else float(joint[-1]["merged_perplexity"])


def train(
    model: str | PathLike[str],
    data: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    heads: str | PathLike[str] | None = None,
    shape: HeadShape | None = None,
    options: TrainOptions = TrainOptions(),
    strict: bool = False,
    save_dtype: Dtype = defaults.HEADS_DTYPE,
    dtype: Dtype | None = None,
    device: str | None = None,
    text_only: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Trained:
    """Trains heads for a model.

    A training that was interrupted continues from its last checkpoint in ``output`` if it is started again with the
    same arguments. Other arguments are refused. Rows that can't be used are left out with a ``MedusaWarning``.

    Args:
        model: A folder in Hugging Face's layout, a hub id, or the path of a ``.gguf`` file. It needs a chat template.
        data: Data sets: folders that ``distill`` wrote, or files of conversations.
        output: The folder of the training. In the end it holds the heads and ``training.json``.
        heads: Heads to train further, in any published format. With ``medusa2`` they replace the first stage.
        shape: The shape of new heads. Not together with ``heads``. The default shape if both are None.
        options: Options that determine the result.
        strict: Refuse data with rows that can't be used, instead of leaving these rows out.
        save_dtype: Type of the weights in the file of heads.
        dtype: Type of the base model's weights; bf16 on a GPU and fp32 elsewhere if None.
        device: ``cpu`` or ``cuda``; a GPU, if there is one, if None.
        text_only: Take the text model out of a larger one, such as one for images and text.
        on_progress: Receives reports, in the main process.

    Returns:
        The folder and the log.

    Raises:
        OptionError: Options contradict each other, or a type is unknown.
        ExtensionError: There is no head architecture of that name.
        CheckpointError: The model or the heads can't be read.
        DatasetError: The data can't be read, or hold nothing to learn from.
        SettingsError: The folder's training began with other options, data or weights.
        TrainingError: The loss is NaN or infinite, or the options are not possible for this model or this machine.
        OutputError: A file can't be written.
    """
    shape, saved = _shape(heads, shape, options), getattr(torch, torch_name(save_dtype))
    processes, source, folder = Processes(device), fspath(model), Path(output)
    kind, reports = dtype_of(dtype, processes.device), on_progress if processes.is_main else ignore_progress
    tokenizer, tokenized = _read(source, data, processes, options, strict=strict)
    base = _load(source, kind, processes, reports, text_only=text_only)
    if options.recipe == "medusa2":
        check_stands_alone(base)  # the changed model is written
    job = TrainingJob(
        base, source, tokenizer, tokenized.samples, folder, processes, options.max_length, on_progress=reports
    )
    trained = _heads(job, heads, shape, options)
    options = replace(options, bf16=processes.device.type == "cuda" if options.bf16 is None else options.bf16)
    job.begin(trained, _asked(options, shape, dtype=kind), tokenized.facts)
    histories = _run(job, trained, options, fresh=heads is None, on_progress=reports)
    if processes.is_main:
        job.save(trained, saved)
        write_text(folder / HISTORY, json.dumps({"recipe": options.recipe, **histories}, indent=1) + "\n")
    return Trained(folder, trained.config.num_heads, histories, processes.is_main)


def _shape(heads: str | PathLike[str] | None, shape: HeadShape | None, options: TrainOptions) -> HeadShape | None:
    """The shape of new heads; None if heads are given."""
    if heads is not None and shape is not None:
        raise OptionError("Heads to train further have their shape: leave the shape out, or train new heads.")
    if heads is not None:
        return None
    shape = shape or HeadShape()
    plain = HeadShape(num_heads=shape.num_heads, architecture=shape.architecture)
    if shape.architecture != defaults.HEAD_ARCHITECTURE and (shape != plain or options.own_projections):
        raise OptionError(
            f"Heads of the architecture {shape.architecture!r} have a shape of their own: give `num_heads` alone."
        )
    return shape


def _read(
    model: str, data: Sequence[str | PathLike[str]], processes: Processes, options: TrainOptions, *, strict: bool
) -> tuple[PreTrainedTokenizerBase, TokenizedData]:
    """Reads and tokenizes the data. This comes first, as loading the model takes much longer."""
    sources = load_sources([Path(path) for path in data], heldout=options.heldout, limit=options.limit)
    with processes.main_first():
        tokenizer = load_chat_tokenizer(model)
    tokenized = sources.tokenized(tokenizer, options.max_length, strict=strict)
    if processes.is_main:
        tokenized.warn_of_skipped(stacklevel=3)
    return tokenizer, tokenized


def _load(model: str, dtype: str, processes: Processes, on_progress: OnProgress, *, text_only: bool) -> PreTrainedModel:
    """Loads the base model, in the main process first."""
    with processes.main_first():
        on_progress(Progress(f"loading {model}"))
        loaded: Any = load_model(model, dtype=getattr(torch, dtype), text_only=text_only)
        placed: PreTrainedModel = loaded.to(processes.device)
    return placed


def _heads(
    job: TrainingJob, heads: str | PathLike[str] | None, shape: HeadShape | None, options: TrainOptions
) -> DraftHeads:
    """New heads of a shape, or the given ones."""
    if heads is None:
        return job.fresh_heads(shape or HeadShape(), own_projections=options.own_projections, seed=options.seed)
    return job.loaded_heads(fspath(heads), projections=options.own_projections)


def _asked(options: TrainOptions, shape: HeadShape | None, *, dtype: str) -> dict[str, Any]:
    """The settings that determine the result, as JSON values."""
    asked = asdict(options) | {"dtype": dtype} | (asdict(shape) if shape is not None else {})
    del asked["hidden_states"]  # the result does not depend on it
    if asked.get("architecture") == defaults.HEAD_ARCHITECTURE:
        del asked["architecture"]  # trainings of earlier versions, which have no such setting, can continue
    return asked


def _run(
    job: TrainingJob, heads: DraftHeads, options: TrainOptions, *, fresh: bool, on_progress: OnProgress
) -> dict[str, History]:
    """Runs the stages of a recipe, and returns the log of each."""
    histories: dict[str, History] = {}
    bf16 = bool(options.bf16)
    if options.recipe == "medusa1" or fresh:
        tokens, held = job.tokens("train"), job.tokens("heldout")
        on_progress(Progress(f"training on {tokens:,} tokens, {held:,} held out"))
        schedule = Schedule(options.epochs, options.learning_rate, options.batch_size, seed=options.seed, bf16=bf16)
        histories["training"] = job.medusa1(
            heads,
            schedule,
            soft=options.soft,
            hidden_states=options.hidden_states,
            conversations=options.conversations,
        )
    if options.recipe == "medusa2":
        on_progress(Progress("training heads and model"))
        schedule = Schedule(
            options.joint_epochs, options.joint_learning_rate, options.conversations, seed=options.seed, bf16=bf16
        )
        lora = Lora(
            rank=options.lora_rank,
            dropout=options.lora_dropout,
            heads_weight=options.heads_weight,
            heads_rate=options.heads_rate,
        )
        histories["joint"] = job.medusa2(heads, schedule, lora)
    return histories

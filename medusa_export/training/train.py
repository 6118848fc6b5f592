"""Trains heads on conversations: the whole way in one call."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from medusa_export.common import defaults
from medusa_export.common.dtypes import Dtype, torch_name
from medusa_export.common.errors import MedusaWarning, OptionError
from medusa_export.common.files import write_text
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.heads.base import DraftHeads
from medusa_export.models.checkpoints import load_model
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
        folder: The folder with the heads; the model of the recipe ``medusa2`` is in ``model`` within it.
        num_heads: Number of heads.
        histories: What was logged in each stage, ``training`` and ``joint``: losses by step, figures on held-out
            conversations by epoch.
        is_main: True in the process that wrote the files. Of several processes one is.
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
    on_progress: OnProgress = ignore_progress,
) -> Trained:
    """Trains heads for a model.

    A training that was interrupted goes on from its last checkpoint in ``output`` when it is started again with the
    same arguments; with others it is refused. Rows that can't be used are left out with a ``MedusaWarning``.

    Args:
        model: A folder in Hugging Face's layout, a hub id, or the path of a ``.gguf`` file. It needs a chat template.
        data: Data sets: folders that ``distill`` wrote, or files of conversations.
        output: The folder of the training. In the end it holds the heads and ``training.json``.
        heads: Heads to train further, in any published format. With ``medusa2`` they replace the first stage.
        shape: The shape of fresh heads, instead of ``heads``; the default shape if both are None.
        options: Options that shape the result.
        strict: Refuse data with rows that can't be used, instead of leaving these rows out.
        save_dtype: Type of the weights in the file of heads.
        dtype: Type of the base model's weights; bf16 on a GPU and fp32 elsewhere if None.
        device: ``cpu`` or ``cuda``; a GPU, if there is one, if None.
        on_progress: Receives reports, in the main process.

    Returns:
        The folder, and what was logged.

    Raises:
        OptionError: Both ``heads`` and ``shape`` are given, or a type is unknown.
        CheckpointError: The model or the heads can't be read.
        DatasetError: The data can't be read, or hold nothing to learn from.
        SettingsError: The folder's training was begun with other options, data or weights.
        TrainingError: The loss is no longer a number, or options can't be honoured.
        OutputError: A file can't be written.
    """
    if heads is not None and shape is not None:
        raise OptionError("Heads to train further have their shape: leave the shape out, or train fresh heads.")
    saved = getattr(torch, torch_name(save_dtype))
    processes, source, folder = Processes(device), fspath(model), Path(output)
    reports = on_progress if processes.is_main else ignore_progress
    kind = dtype_of(dtype, processes.device)
    tokenizer, tokenized = _read(source, data, processes, options, strict=strict)
    with processes.main_first():
        reports(Progress(f"loading {source}"))
        base = load_model(source, dtype=getattr(torch, kind)).to(processes.device)
    job = TrainingJob(
        base, source, tokenizer, tokenized.samples, folder, processes, options.max_length, on_progress=reports
    )
    trained = _heads(job, heads, shape or HeadShape(), options)
    bf16 = processes.device.type == "cuda" if options.bf16 is None else options.bf16
    asked = asdict(options) | {"bf16": bf16, "dtype": kind} | (asdict(shape or HeadShape()) if heads is None else {})
    del asked["hidden_states"]  # the result does not depend on it
    job.begin(trained, asked, tokenized.facts)
    histories = _run(job, trained, options, bf16=bf16, fresh=heads is None, on_progress=reports)
    if processes.is_main:
        reports(Progress("saving"))
        job.save(trained, saved)
        write_text(folder / HISTORY, json.dumps({"recipe": options.recipe, **histories}, indent=1) + "\n")
    return Trained(folder, trained.config.num_heads, histories, processes.is_main)


def _read(
    model: str, data: Sequence[str | PathLike[str]], processes: Processes, options: TrainOptions, *, strict: bool
) -> tuple[PreTrainedTokenizerBase, TokenizedData]:
    """Reads and tokenizes the data. This comes before the model is loaded, which takes much longer."""
    sources = load_sources([Path(path) for path in data], heldout=options.heldout, limit=options.limit)
    with processes.main_first():
        tokenizer = load_chat_tokenizer(model)
    tokenized = sources.tokenized(tokenizer, options.max_length, strict=strict)
    if tokenized.note and processes.is_main:
        warnings.warn(tokenized.note, MedusaWarning, stacklevel=3)
    return tokenizer, tokenized


def _heads(job: TrainingJob, heads: str | PathLike[str] | None, shape: HeadShape, options: TrainOptions) -> DraftHeads:
    if heads is None:
        return job.fresh_heads(shape, own_projections=options.own_projections)
    return job.loaded_heads(fspath(heads), projections=options.own_projections)


def _run(
    job: TrainingJob, heads: DraftHeads, options: TrainOptions, *, bf16: bool, fresh: bool, on_progress: OnProgress
) -> dict[str, History]:
    """Runs the stages of a recipe, and returns what each logged."""
    histories: dict[str, History] = {}
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

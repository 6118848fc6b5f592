"""Runs a training of either recipe with transformers' Trainer: schedule, checkpoints, evaluation, resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from medusa_export.common.errors import OutputError, TrainingError
from medusa_export.common.files import WRITE_ERRORS
from medusa_export.common.progress import OnProgress, Progress, Task, ignore_progress
from medusa_export.compat.transformers import one_gpu_per_process, quiet_libraries, restore_weights

_SAVED_SHARE = 0.1  # steps between checkpoints, as a share of all steps: a killed training loses at most these


@dataclass(frozen=True)
class Schedule:
    """The schedule of a training.

    Attributes:
        epochs: Passes over the data.
        learning_rate: Learning rate at its peak. After the peak it falls along a cosine.
        batch_size: Examples per step and device.
        warmup_steps: Steps up to the peak.
        seed: Seed of the order of the data.
        bf16: True to compute matrix products in bfloat16.
    """

    epochs: float
    learning_rate: float
    batch_size: int
    warmup_steps: int = 40
    seed: int = 0
    bf16: bool = False


class _Shown(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Reports steps and evaluations."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            self._on_progress = ignore_progress
        self._task = Task("training", state.max_steps, self._on_progress, done=state.global_step, unit="steps")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._task.add(1)
        self._task.finish_piece()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        found = logs or {}
        if not np.isfinite([value for name, value in found.items() if name in ("loss", "eval_loss")]).all():
            raise _not_a_number()
        if "eval_loss" in found:
            hits = " ".join(f"{value:.1%}" for name, value in found.items() if name.endswith("_top1"))
            line = f"epoch {found['epoch']:.3g}: held-out loss {found['eval_loss']:.4g}, top-1 {hits}"
            self._on_progress(Progress(line))


class _WithEvaluation(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Saves the checkpoint at the end of an epoch after the epoch's evaluation.

    If it were saved before, a training that continues from it would lack the evaluation.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps or state.epoch == int(state.epoch):
            control.should_save = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_save = True


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """transformers' Trainer with errors that name a checkpoint. A checkpoint that is half written is removed."""

    def _save_checkpoint(self, *arguments: Any) -> None:
        folder = Path(self.args.output_dir)
        try:
            super()._save_checkpoint(*arguments)
        except (*WRITE_ERRORS, RuntimeError) as error:  # torch raises RuntimeError
            free = shutil.disk_usage(folder).free >> 20
            shutil.rmtree(folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", ignore_errors=True)
            raise OutputError(
                f"A checkpoint can't be written to {folder}, where {free:,} MiB are free ({error}). Make room and run "
                "again: earlier checkpoints are complete."
            ) from error

    def _load_from_checkpoint(self, checkpoint: str, *arguments: Any) -> None:
        with _reading(checkpoint):
            super()._load_from_checkpoint(checkpoint, *arguments)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, PermissionError):  # the checkpoint may be fine, so don't advise to delete it
        raise
    except (OSError, EOFError, SafetensorError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        raise TrainingError(
            f"{checkpoint} is damaged ({error!r}): delete it and run again to continue from the one before."
        ) from error


def _as_tuple(arrays: Any) -> tuple[Any, ...]:
    """The Trainer's predictions as a tuple. It passes a single array without one."""
    return arrays if isinstance(arrays, tuple) else (arrays,)


def _last_complete(checkpoints: Path) -> str | None:
    """The last complete checkpoint; None if there is none.

    The Trainer writes its state, a JSON file, last. If it was killed meanwhile, the JSON is incomplete. If the
    optimizer or the scheduler is missing, the Trainer would start with new ones without a warning.
    """
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        with suppress(OSError, ValueError):
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            if all(any(path.glob(f"{part}*")) for part in ("optimizer", "scheduler")):
                return str(path)
    return None


def _state_of(checkpoint: str) -> TrainerState:
    with _reading(checkpoint):
        state: TrainerState = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    return state


def run_training(
    module: nn.Module,
    train: Dataset[Any],
    heldout: Dataset[Any],
    schedule: Schedule,
    checkpoints: Path,
    *,
    collate: Callable[[Any], dict[str, Any]],
    metrics: Callable[..., dict[str, float]],
    device: torch.device,
    on_progress: OnProgress = ignore_progress,
    optimizer: torch.optim.Optimizer | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, Any]]:
    """Trains a module whose ``forward`` returns its ``loss``. Continues from the last checkpoint, if there is one.

    Args:
        module: The module to train. In eval mode it also returns the arrays for ``metrics``.
        train: The training set.
        heldout: The examples to evaluate on, before the first step and after each epoch.
        schedule: The schedule.
        checkpoints: Folder of the checkpoints.
        collate: Makes a batch of examples. The batch has a key ``targets``.
        metrics: Computes figures from the arrays that the module returned beside its loss, in order.
        device: The device to train on.
        on_progress: Receives reports on steps and evaluations.
        optimizer: The optimizer; AdamW without weight decay if None.
        callbacks: More callbacks for the Trainer.

    Returns:
        The training's log: losses by step, and figures on held-out examples by epoch.

    Raises:
        OutputError: A checkpoint can't be written.
        TrainingError: The loss is NaN or infinite, or a checkpoint can't be read.
    """
    checkpoint = _last_complete(checkpoints)
    trainer = _Trainer(
        model=module,
        args=_arguments(schedule, checkpoints, device, evaluate_first=checkpoint is None),
        train_dataset=train,
        eval_dataset=heldout,
        data_collator=collate,
        compute_metrics=lambda found: metrics(*_as_tuple(found.predictions)),
        optimizers=(optimizer, None),
        callbacks=[*callbacks, _WithEvaluation(), _Shown(on_progress)],
    )
    trainer.remove_callback(PrinterCallback)
    with quiet_libraries():
        if checkpoint is not None and (state := _state_of(checkpoint)).global_step >= state.max_steps:
            trainer.state = state
            restore_weights(trainer, checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    if not all(bool(weight.isfinite().all()) for weight in module.parameters() if weight.requires_grad):
        raise _not_a_number()  # the last step made a weight NaN or infinite
    history: list[dict[str, Any]] = trainer.state.log_history
    return history


def _arguments(
    schedule: Schedule, checkpoints: Path, device: torch.device, *, evaluate_first: bool
) -> TrainingArguments:
    """The Trainer's arguments. ``evaluate_first`` asks for an evaluation before the first step."""
    made = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch_size,
        per_device_eval_batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=schedule.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=schedule.bf16,
        use_cpu=device.type == "cpu",
        seed=schedule.seed,
        eval_strategy="epoch",
        eval_on_start=evaluate_first,
        save_strategy="steps",
        save_steps=_SAVED_SHARE,
        save_total_limit=2,
        logging_steps=10,
        label_names=["targets"],
        remove_unused_columns=False,
        logging_nan_inf_filter=False,  # otherwise the log shows a finite loss in place of NaN
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    one_gpu_per_process(made)
    return made


def _not_a_number() -> TrainingError:
    return TrainingError(
        "The loss is NaN or infinite: delete the checkpoints, and lower the learning rate or train without bf16."
    )

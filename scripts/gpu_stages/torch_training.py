"""Stages ``torch-training`` and ``torch-heads``: speed of distill, train and calibrate, and heads from more data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gpu_stages.context import Context, Stopwatch, write_prompts
from medusa_export import DistillOptions, HeadShape, TrainOptions, calibrate, distill, train
from medusa_export.trees.calibration import Calibration

# Tokens that the heads in scripts/smollm2_heads were trained on.
_SHIPPED_TOKENS = 2_143_819


def run(context: Context) -> None:
    """Measures tokens per second of each command, with new heads for the base model."""
    work = _fresh(context.folder / "training")
    data = _written(context, work, seconds=context.seconds)
    with Stopwatch() as watch:
        shape = HeadShape(num_layers=1, draft_vocab=None)
        epochs = 1.0 if context.is_dry else 3.0
        trained = train(
            context.base_model(), [data], work / "heads", shape=shape, options=_options(context, epochs),
            device=str(context.device),
        )  # fmt: skip
    run_seconds = float(trained.histories["training"][-1]["train_runtime"])
    tokens = context.report["distill"]["tokens"]
    context.note(
        train={
            "seconds": watch.seconds,
            "optimizing_seconds": run_seconds,
            "epochs": epochs,
            "tokens_per_second": epochs * tokens / run_seconds,
            "heldout": trained.heldout,
        }
    )
    _calibrated(context, "calibrate", work / "heads", data)


def run_heads(context: Context) -> None:
    """Trains heads like the shipped ones on ten times their data, or on as much as there is time for.

    The base model writes the data; most of the time goes into that. Both heads are then calibrated on the same held-out
    part of it.
    """
    heads = context.heads
    if context.is_dry:
        heads = str(context.folder / "training" / "heads")  # of the stage before
    elif context.model is None or heads is None:
        context.note(refused="There is no model at hand: give `--model` and `--heads`.")
        return
    work = _fresh(context.folder / "heads")
    data = _written(context, work, seconds=3 * context.seconds, most_tokens=10 * _SHIPPED_TOKENS)
    with Stopwatch() as watch:
        shape = HeadShape(num_layers=2, draft_vocab=50 if context.is_dry else 6144)
        options = _options(context, 1.0 if context.is_dry else 3.0, soft=0.5)
        train(context.base_model(), [data], work / "trained", shape=shape, options=options, device=str(context.device))
    context.note(train={"seconds": watch.seconds})
    before = _calibrated(context, "shipped", heads, data)
    after = _calibrated(context, "more_data", work / "trained", data)
    context.note(
        tokens_of_shipped_heads=_SHIPPED_TOKENS,
        top1={"shipped": _top1(before), "more_data": _top1(after)},
    )


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _written(context: Context, work: Path, *, seconds: float, most_tokens: float = float("inf")) -> Path:
    """Lets the model write data for about ``seconds``. A short run measures first how much that is."""
    batch, length = (12, 8) if context.is_dry else (256, 256)
    speeds: dict[str, Any] = {}
    count, folder = batch, work
    for name in ("warm-up", "data"):
        folder = work / name
        prompts = [] if context.model is not None else [write_prompts(work / f"{name}.txt", count)]
        options = DistillOptions(
            magpie=0 if prompts else count, max_new_tokens=length, temperature=0.0 if name == "data" else 0.7,
            prompt_temperature=0.9, heldout=0.5 if context.is_dry else 0.05, batch_size=batch,
        )  # fmt: skip
        with Stopwatch() as watch:
            made = distill(context.base_model(), folder, prompts=prompts, options=options, device=str(context.device))
        tokens = sum(split.tokens for split in made.splits.values())
        speeds = {
            "seconds": watch.seconds,
            "conversations": made.answers,
            "tokens": tokens,
            "tokens_per_second": tokens / watch.seconds,
        }
        context.note(distill=speeds)
        scale = min(seconds / watch.seconds, most_tokens / max(tokens, 1))
        count = max(batch, int(count * scale) // batch * batch)
    return folder


def _options(context: Context, epochs: float, *, soft: float = 0.0) -> TrainOptions:
    return TrainOptions(epochs=epochs, soft=soft, max_length=64 if context.is_dry else 512, batch_size=2048)


def _calibrated(context: Context, name: str, heads: str | Path, data: Path) -> Calibration:
    """Calibrates heads on the held-out part of the data, and notes the speed."""
    with Stopwatch() as watch:
        found = calibrate(
            context.base_model(), heads, [data], max_length=64 if context.is_dry else 512, device=str(context.device)
        )
    context.note(**{name: {"seconds": watch.seconds, "top1": _top1(found)}})
    return found


def _top1(found: Calibration) -> list[float]:
    """The share of places in which the best candidate of each head is right."""
    return [head[0] for head in found.accuracies]

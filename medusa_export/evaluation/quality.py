"""Measures what quantization costs: bundles against the unquantized model, on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from medusa_export.common import defaults
from medusa_export.common.errors import OptionError, VerificationError
from medusa_export.common.progress import OnProgress, Progress, Task, ignore_progress
from medusa_export.evaluation.figures import Closeness
from medusa_export.evaluation.logits import compare
from medusa_export.evaluation.texts import samples_of
from medusa_export.heads.base import DraftHeads
from medusa_export.heads.files import load_heads
from medusa_export.models.checkpoints import load_model
from medusa_export.training.calibrate import load_with_integers, measured
from medusa_export.training.conversations import Sample
from medusa_export.trees.calibration import Calibration
from medusa_export.verification.stored_matrices import stored_bits
from medusa_runtime.bundles.bundle import WEIGHTS, Bundle
from medusa_runtime.bundles.compiled import require_bundle
from medusa_runtime.bundles.tree import Tree

_MEASURED_WITH = {
    "closeness": "the bundle's own graph, in ONNX Runtime on the CPU",
    "heads": "PyTorch, with the bundle's matrices of integers",
}


@dataclass(frozen=True)
class HeadQuality:
    """Hit rates of heads on held-out text.

    Attributes:
        accuracies: By head k and rank r, the share of positions at which this candidate is right; not cumulative.
        tokens_per_step: Expected tokens per step with the bundle's tree, lookup hits included.
    """

    accuracies: tuple[tuple[float, ...], ...]
    tokens_per_step: float

    @classmethod
    def of(cls, calibration: Calibration, tree: Tree) -> HeadQuality:
        """The figures of a calibration for a tree."""
        values = (calibration.value(path) for path in ((), *tree.paths))
        return cls(calibration.accuracies, sum(values))


@dataclass(frozen=True)
class BundleQuality:
    """The quality of a bundle.

    Attributes:
        name: The name of the bundle's folder.
        bits: Bits per value of the matrices that products read, without scales, on average.
        megabytes: Size of the file of weights.
        closeness: The bundle's logits against the unquantized model's.
        heads: The heads with the bundle's weights; None if no heads were given.
        heads_before: The same heads, and the same tree, on the unquantized model.
    """

    name: str
    bits: float
    megabytes: float
    closeness: Closeness
    heads: HeadQuality | None = None
    heads_before: HeadQuality | None = None


@dataclass(frozen=True)
class Quality:
    """The quality of some bundles.

    Attributes:
        model: The unquantized model's name.
        texts: Number of texts.
        bundles: The bundles, in the order in which they were given.
    """

    model: str
    texts: int
    bundles: tuple[BundleQuality, ...]

    def figures(self) -> dict[str, Any]:
        """All figures as JSON values, and what they were measured with."""
        found = asdict(self) | {"measured_with": _MEASURED_WITH}
        for given, bundle in zip(found["bundles"], self.bundles, strict=True):
            given["closeness"]["perplexity_ratio"] = bundle.closeness.perplexity_ratio
        return found


def quality(
    bundles: Sequence[str | PathLike[str]],
    model: str | PathLike[str],
    *,
    heads: str | PathLike[str] | None = None,
    data: Sequence[str | PathLike[str]] = (),
    texts: Sequence[str | PathLike[str]] = (),
    max_length: int = defaults.QUALITY_LENGTH,
    limit: int | None = None,
    threads: int | None = None,
    text_only: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Quality:
    """Measures what quantization costs: perplexity, KL divergence and choices of bundles against those of a model.

    The logits are those of each bundle's own graph, as ONNX Runtime runs it on the CPU with several rows. Heads run in
    PyTorch, with the bundle's matrices of integers in the place of the model's.

    Args:
        bundles: The folders of the bundles.
        model: The unquantized model: a folder in Hugging Face's layout, a hub id, or the path of a ``.gguf`` file.
        heads: The heads that the bundles were exported with; None to measure no heads.
        data: Held-out conversations: folders that ``distill`` wrote, or files of conversations. Answers count.
        texts: Files of plain text. All their tokens count. Without ``data`` and ``texts``, the model answers the
            prompts of ``bench``, at temperature 1.
        max_length: Largest number of tokens of a text.
        limit: Largest number of texts; None for all.
        threads: CPU threads of a step; all if None.
        text_only: Take the text model out of a larger one, such as one for images and text.
        on_progress: Receives reports.

    Raises:
        OptionError: No bundles are given.
        BundleError: A bundle can't be read.
        CheckpointError: The model or the heads can't be read.
        DatasetError: The texts can't be read, or hold nothing to measure.
        VerificationError: A bundle was exported from another model.
        BackendError: ONNX Runtime can't run a bundle.
    """
    opened = [_opened(Path(bundle)) for bundle in bundles]
    if not opened:
        raise OptionError("No bundles are given.")
    source = fspath(model)
    samples = samples_of(
        source,
        [Path(path) for path in data],
        [Path(path) for path in texts],
        max_length=max_length,
        limit=limit,
        text_only=text_only,
        on_progress=on_progress,
    )
    closeness = _closeness(opened, source, samples, threads, on_progress, text_only=text_only)
    measurement = _HeadMeasurement(
        source, None if heads is None else fspath(heads), samples, on_progress, text_only=text_only
    )
    found = [
        BundleQuality(
            bundle.folder.resolve().name,
            stored_bits(bundle) or 8.0 * np.dtype(bundle.dtype).itemsize,
            bundle.files[WEIGHTS].size / 1e6,
            close,
            *measurement.of(bundle),
        )
        for bundle, close in zip(opened, closeness, strict=True)
    ]
    return Quality(Path(source).name, len(samples), tuple(found))


def _opened(folder: Path) -> Bundle:
    require_bundle(folder)
    return Bundle.load(folder)


def _closeness(
    bundles: Sequence[Bundle],
    model: str,
    samples: Sequence[Sample],
    threads: int | None,
    on_progress: OnProgress,
    *,
    text_only: bool,
) -> list[Closeness]:
    """Compares the logits of each bundle with the model's."""
    on_progress(Progress(f"loading {model}"))
    reference = load_model(model, dtype=torch.float32, text_only=text_only)
    found = []
    for bundle in bundles:
        _check_model(bundle, reference, model)
        task = Task(f"comparing {bundle.folder.name}", len(samples), on_progress, unit="tokens")
        found.append(Closeness.of(compare(bundle, reference, samples, threads=threads, task=task)))
    return found


def _check_model(bundle: Bundle, reference: PreTrainedModel, model: str) -> None:
    vocab_size = reference.get_output_embeddings().weight.shape[0]
    if bundle.model.vocab_size != vocab_size:
        raise VerificationError(
            f"The vocabulary of {bundle.folder} is {bundle.model.vocab_size}, and that of {model} is {vocab_size}: "
            "give the model that the bundle was made of, before it was quantized."
        )


class _HeadMeasurement:
    """Measures heads with the weights of bundles, and with the unquantized model.

    Args:
        model: The unquantized model.
        heads: The heads; None to measure none.
        samples: The texts as tokens.
        on_progress: Receives reports.
        text_only: The bundles hold the text model of a larger model.
    """

    def __init__(
        self,
        model: str,
        heads: str | None,
        samples: Sequence[Sample],
        on_progress: OnProgress,
        *,
        text_only: bool,
    ) -> None:
        self._model, self._heads, self._samples, self._on_progress = model, heads, samples, on_progress
        self._text_only = text_only
        self._before: Calibration | None = None

    def of(self, bundle: Bundle) -> tuple[HeadQuality, HeadQuality] | tuple[()]:
        """The heads with a bundle's weights, and with the unquantized model; nothing without heads."""
        if self._heads is None or bundle.heads is None:
            return ()
        if self._before is None:
            base = load_model(self._model, dtype=torch.float32, text_only=self._text_only)
            self._before = self._measured(base, load_heads(self._heads, base).float())
        after = self._measured(*load_with_integers(bundle, self._model, self._heads, text_only=self._text_only))
        return HeadQuality.of(after, bundle.tree), HeadQuality.of(self._before, bundle.tree)

    def _measured(self, model: PreTrainedModel, heads: DraftHeads) -> Calibration:
        return measured(
            heads,
            model,
            [self._samples],
            max_length=max(len(sample.input_ids) for sample in self._samples),
            lookup=True,
            names={"model": "", "heads": ""},
            on_progress=self._on_progress,
        )

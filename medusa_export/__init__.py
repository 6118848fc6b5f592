"""Compiles Hugging Face language models with MEDUSA heads to standard ONNX bundles and TensorRT engines.

Each function does what the command of the same kind does, and returns its result:

* ``export`` compiles a model with heads to a bundle, ``build_engine`` a bundle to a TensorRT engine;
* ``write_triton_repository`` writes a model of Triton Inference Server that answers with a bundle;
* ``verify`` checks a bundle against PyTorch, ``bench`` measures its speed, ``quality`` what its quantization costs;
* ``quantize`` rounds a model's weights with GPTQ;
* ``activations`` measures the ranges of a model's activations, for exports that round them;
* ``distill`` writes training data, ``train`` trains heads on it, ``calibrate`` measures their hit rates, and
  ``search_tree`` finds the best draft tree for these rates.

Functions report to ``on_progress``; ``on_progress=print`` is enough to follow a job. What a user should know about a
model or its data comes as ``MedusaWarning``. All errors are a ``MedusaError``. ``medusa_runtime`` decodes with bundles.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medusa_export.common.extras import extra

if TYPE_CHECKING:
    from medusa_export.benchmarks.bench import BenchResult, bench
    from medusa_export.benchmarks.peers import BenchPeers
    from medusa_export.benchmarks.prompts import BenchPrompt, bench_prompts
    from medusa_export.benchmarks.speeds import Speed
    from medusa_export.common.errors import (
        CheckpointError,
        DatasetError,
        EngineBuildError,
        ExportError,
        ExtensionError,
        MedusaWarning,
        MissingExtraError,
        ModelNotSupportedError,
        OptionError,
        OutputError,
        SettingsError,
        TrainingError,
        VerificationError,
    )
    from medusa_export.common.progress import OnProgress, Progress
    from medusa_export.evaluation.figures import Closeness
    from medusa_export.evaluation.quality import BundleQuality, HeadQuality, Quality, quality
    from medusa_export.heads.base import DraftHeads
    from medusa_export.heads.convert import convert_heads
    from medusa_export.heads.modules import MedusaHeads
    from medusa_export.models.activations import ActivationRanges
    from medusa_export.models.weight_types import WeightTypes
    from medusa_export.quantization.quantize import quantize
    from medusa_export.targets.export import export
    from medusa_export.targets.tensorrt.build import build_engine
    from medusa_export.targets.triton import write_triton_repository
    from medusa_export.training.activations import activations
    from medusa_export.training.calibrate import calibrate
    from medusa_export.training.distill import distill
    from medusa_export.training.distillation import Distilled, Split
    from medusa_export.training.options import DistillOptions, HeadShape, TrainOptions
    from medusa_export.training.train import Trained, train
    from medusa_export.trees.calibration import Calibration
    from medusa_export.trees.search import search_tree
    from medusa_export.trees.timing import TreeTimes, time_tree
    from medusa_export.verification.checks import Check, Tolerances, Verification
    from medusa_export.verification.verify import verify
    from medusa_runtime.bundles.bundle import Bundle
    from medusa_runtime.bundles.compiled import CompiledEngine
    from medusa_runtime.bundles.tree import Tree
    from medusa_runtime.errors import BackendError, BundleError, MedusaError, TreeError

_MODULES = {
    "ActivationRanges": "medusa_export.models.activations",
    "BackendError": "medusa_runtime.errors",
    "BenchPeers": "medusa_export.benchmarks.peers",
    "BenchPrompt": "medusa_export.benchmarks.prompts",
    "BenchResult": "medusa_export.benchmarks.bench",
    "Bundle": "medusa_runtime.bundles.bundle",
    "BundleError": "medusa_runtime.errors",
    "BundleQuality": "medusa_export.evaluation.quality",
    "Calibration": "medusa_export.trees.calibration",
    "Check": "medusa_export.verification.checks",
    "CheckpointError": "medusa_export.common.errors",
    "Closeness": "medusa_export.evaluation.figures",
    "CompiledEngine": "medusa_runtime.bundles.compiled",
    "DatasetError": "medusa_export.common.errors",
    "DistillOptions": "medusa_export.training.options",
    "Distilled": "medusa_export.training.distillation",
    "DraftHeads": "medusa_export.heads.base",
    "EngineBuildError": "medusa_export.common.errors",
    "ExportError": "medusa_export.common.errors",
    "ExtensionError": "medusa_export.common.errors",
    "HeadQuality": "medusa_export.evaluation.quality",
    "HeadShape": "medusa_export.training.options",
    "MedusaError": "medusa_runtime.errors",
    "MedusaHeads": "medusa_export.heads.modules",
    "MedusaWarning": "medusa_export.common.errors",
    "MissingExtraError": "medusa_export.common.errors",
    "ModelNotSupportedError": "medusa_export.common.errors",
    "OnProgress": "medusa_export.common.progress",
    "OptionError": "medusa_export.common.errors",
    "OutputError": "medusa_export.common.errors",
    "Progress": "medusa_export.common.progress",
    "Quality": "medusa_export.evaluation.quality",
    "SettingsError": "medusa_export.common.errors",
    "Speed": "medusa_export.benchmarks.speeds",
    "Split": "medusa_export.training.distillation",
    "Tolerances": "medusa_export.verification.checks",
    "TrainOptions": "medusa_export.training.options",
    "Trained": "medusa_export.training.train",
    "TrainingError": "medusa_export.common.errors",
    "Tree": "medusa_runtime.bundles.tree",
    "TreeError": "medusa_runtime.errors",
    "TreeTimes": "medusa_export.trees.timing",
    "Verification": "medusa_export.verification.checks",
    "VerificationError": "medusa_export.common.errors",
    "WeightTypes": "medusa_export.models.weight_types",
    "activations": "medusa_export.training.activations",
    "bench": "medusa_export.benchmarks.bench",
    "bench_prompts": "medusa_export.benchmarks.prompts",
    "build_engine": "medusa_export.targets.tensorrt.build",
    "calibrate": "medusa_export.training.calibrate",
    "convert_heads": "medusa_export.heads.convert",
    "distill": "medusa_export.training.distill",
    "export": "medusa_export.targets.export",
    "quality": "medusa_export.evaluation.quality",
    "quantize": "medusa_export.quantization.quantize",
    "search_tree": "medusa_export.trees.search",
    "time_tree": "medusa_export.trees.timing",
    "train": "medusa_export.training.train",
    "verify": "medusa_export.verification.verify",
    "write_triton_repository": "medusa_export.targets.triton",
}

__all__ = [
    "ActivationRanges",
    "BackendError",
    "BenchPeers",
    "BenchPrompt",
    "BenchResult",
    "Bundle",
    "BundleError",
    "BundleQuality",
    "Calibration",
    "Check",
    "CheckpointError",
    "Closeness",
    "CompiledEngine",
    "DatasetError",
    "DistillOptions",
    "Distilled",
    "DraftHeads",
    "EngineBuildError",
    "ExportError",
    "ExtensionError",
    "HeadQuality",
    "HeadShape",
    "MedusaError",
    "MedusaHeads",
    "MedusaWarning",
    "MissingExtraError",
    "ModelNotSupportedError",
    "OnProgress",
    "OptionError",
    "OutputError",
    "Progress",
    "Quality",
    "SettingsError",
    "Speed",
    "Split",
    "Tolerances",
    "TrainOptions",
    "Trained",
    "TrainingError",
    "Tree",
    "TreeError",
    "TreeTimes",
    "Verification",
    "VerificationError",
    "WeightTypes",
    "activations",
    "bench",
    "bench_prompts",
    "build_engine",
    "calibrate",
    "convert_heads",
    "distill",
    "export",
    "quality",
    "quantize",
    "search_tree",
    "time_tree",
    "train",
    "verify",
    "write_triton_repository",
]

# Functions that need more than the extra ``export`` installs.
_EXTRAS = {"calibrate": "train", "distill": "train", "quality": "train", "quantize": "train", "train": "train"}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that importing the package needs no torch.

    Raises:
        MissingExtraError: The name needs a package that is not installed.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra(_EXTRAS.get(name, "export")):
        return getattr(import_module(_MODULES[name]), name)

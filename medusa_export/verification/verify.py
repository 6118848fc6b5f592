"""Checks a bundle, or a backend that runs it, against PyTorch: ``medusa_export.verify``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from medusa_export.common import defaults
from medusa_export.common.errors import OptionError
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.step.reference import load_reference, prompt_ids
from medusa_export.step.step import MedusaStep
from medusa_export.verification.backend import verify_backend
from medusa_export.verification.bundle import verify_bundle
from medusa_export.verification.checks import Check, Verification
from medusa_export.verification.plan import VerifyOptions
from medusa_export.verification.stored_matrices import use_stored_matrices
from medusa_export.verification.weights import weights_check
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import require_bundle

# The prompts of a check that is given none.
PROMPTS = (
    "Write a short story about a clockmaker who repairs time itself.",
    "Explain how a vaccine trains the immune system, step by step.",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "The three largest cities of Japan are",
    "Translate to French: The weather is lovely today, isn't it?",
    "List the planets of the solar system with one fact about each.",
)


def verify(
    bundle: str | PathLike[str] | Bundle,
    model: str | PathLike[str],
    *,
    heads: str | PathLike[str] | None = None,
    text_only: bool = False,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = defaults.VERIFIED_TOKENS,
    tree_sizes: Sequence[int | Literal["full"]] | None = None,
    prefill_chunks: Sequence[int] = defaults.PREFILL_CHUNKS,
    margin: float | None = None,
    backend: str | None = None,
    offload: str | PathLike[str] | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Verification:
    """Checks a bundle against PyTorch: logits, every integer of a step, whole generations, and the weights.

    The reference has the bundle's weights and computes in fp32. Its weights are compared with the files that they were
    read from. A difference is a check that failed, never an exception.

    Args:
        bundle: The bundle, or its folder. With ``backend``, it may be the folder of a compiled engine.
        model: The folder, hub id or ``.gguf`` file that the bundle was exported from.
        heads: The trained heads that the bundle was exported with; None if it has none, or fresh ones.
        text_only: The bundle holds the text model of a larger model, whose own answers are the reference.
        prompts: Prompts to decode, as texts; a few built-in ones if None.
        max_new_tokens: Tokens to generate per prompt, 2 or more.
        tree_sizes: Tree sizes to decode with, in nodes; ``full`` is the whole tree. If None, 1, a middle one and all.
        prefill_chunks: Chunk sizes to take prompts in with, in tokens per step.
        margin: Largest difference between two logits that makes the choice between them a tie. If None, it depends on
            the bundle's dtype.
        backend: The backend to check, such as ``tensorrt``, ``tensorrt-rtx`` or ``onnxruntime-cuda``. If None, every
            graph of the bundle is checked in ONNX Runtime on the CPU.
        offload: A folder for the reference's weights, which take four bytes each, if they don't fit in memory. They are
            there while the check runs. None keeps them in memory.
        on_progress: Receives reports.

    Returns:
        The outcome. ``not_run`` says why if this machine can't run the backend.

    Raises:
        OptionError: A tree size is larger than the bundle's tree.
        BundleError: The bundle can't be read.
        CheckpointError: The model or the heads can't be read.
        OutputError: The weights can't be written to ``offload``.
        VerificationError: The bundle was exported from another model, or with other heads.
        BackendError: The backend failed in a step.
    """
    bundle = _opened(bundle, needs_graph=backend is None)
    options = VerifyOptions(max_new_tokens, _sizes(bundle, tree_sizes), prefill_chunks, margin)
    ids = prompt_ids(bundle, PROMPTS if prompts is None else prompts, chosen=prompts is not None)
    with _offload_folder(offload) as folder:
        on_progress(Progress(f"loading {fspath(model)}"))
        step = load_reference(
            bundle,
            fspath(model),
            None if heads is None else fspath(heads),
            text_only=text_only,
            offload_folder=folder,
            on_progress=on_progress,
        )
        weights = _weights_checks(bundle, fspath(model), step, on_progress)
        run = partial(verify_bundle, bundle) if backend is None else partial(verify_backend, bundle, backend)
        outcome = run(step, ids, options, on_progress=on_progress)
    return replace(outcome, checks=[*weights, *outcome.checks])


@contextmanager
def _offload_folder(parent: str | PathLike[str] | None) -> Iterator[Path | None]:
    """Makes a folder of its own in the folder for the reference's weights, and deletes it when the block ends."""
    if parent is None:
        yield None
        return
    if not Path(parent).is_dir():
        raise OptionError(f"{fspath(parent)} is no folder: give one that is there as `offload`.")
    with TemporaryDirectory(dir=parent, prefix="reference-") as folder:
        yield Path(folder)


def _weights_checks(bundle: Bundle, model: str, step: MedusaStep, on_progress: OnProgress) -> list[Check]:
    """Compares the reference's weights with their files. Then gives it the integers that the bundle stores."""
    on_progress(Progress("comparing weights with their files"))
    checks = [weights_check(model, step.model, bundle.dtype)]
    if bundle.weights.is_quantized:
        on_progress(Progress("comparing weights with those that the bundle stores"))
        checks.append(use_stored_matrices(step, bundle))
    return checks


def _opened(bundle: str | PathLike[str] | Bundle, *, needs_graph: bool) -> Bundle:
    if isinstance(bundle, Bundle):
        return bundle
    if needs_graph:
        require_bundle(Path(bundle))
    return Bundle.load(Path(bundle))


def _sizes(bundle: Bundle, tree_sizes: Sequence[int | Literal["full"]] | None) -> list[int] | None:
    """Returns tree sizes as numbers of nodes."""
    if tree_sizes is None:
        return None
    sizes = [bundle.tree.size if size == "full" else size for size in tree_sizes]
    if largest := next((size for size in sizes if size > bundle.tree.size), None):
        raise OptionError(
            f"The tree size {largest} is too large: the tree of this bundle has {bundle.tree.size} nodes."
        )
    return sizes


def read_prompts(path: Path) -> list[str]:
    """Reads prompts from a text file, one per line.

    Raises:
        OptionError: The file can't be read, or holds no prompts.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"The prompts in {path} can't be read: {error}.") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise OptionError(f"{path} holds no prompts: give one per line.")
    return found

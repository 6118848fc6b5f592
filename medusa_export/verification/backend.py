"""Parity of a backend with PyTorch: a bundle on a GPU, or a compiled engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from medusa_export.common import defaults
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.step.step import MedusaStep
from medusa_export.verification.bundle import check_same, tree_sizes_of
from medusa_export.verification.checks import Tolerances, Verification
from medusa_export.verification.generation import generation_checks
from medusa_export.verification.reference import answered_prompts
from medusa_export.verification.steps import StepChecks
from medusa_runtime.backends import open_backend
from medusa_runtime.backends.base import Backend
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import CompiledEngine, is_engine
from medusa_runtime.engine import MedusaEngine
from medusa_runtime.errors import BackendError


def verify_backend(
    bundle: Bundle,
    backend: str,
    step: MedusaStep,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = defaults.VERIFIED_TOKENS,
    tree_sizes: Sequence[int] | None = None,
    prefill_chunks: Sequence[int] = defaults.PREFILL_CHUNKS,
    tolerances: Tolerances | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Verification:
    """Checks a backend against PyTorch. It compares no logits, because a compiled engine does not return them.

    Args:
        bundle: The bundle or the compiled engine that the backend runs.
        backend: The backend's name.
        step: The reference: the same model, heads and tree, computing in fp32.
        prompts: Token ids of each prompt.
        max_new_tokens: Tokens to generate per prompt.
        tree_sizes: Tree sizes to decode with, in nodes; 1, a middle one and all if None.
        prefill_chunks: Chunk sizes, in tokens per step.
        tolerances: Differences that pass; by the bundle's dtype if None.
        on_progress: Receives reports.

    Returns:
        The outcome. ``not_run`` says why if this machine can't open the backend.

    Raises:
        VerificationError: The bundle has another model or tree than the step.
        BackendError: The backend failed in a step.
    """
    check_same(bundle, step)
    tolerances = tolerances or Tolerances.of(bundle.dtype)
    sizes = tree_sizes_of(bundle, tree_sizes)
    on_progress(Progress(f"opening {backend}"))
    try:
        opened = _open_two_rows(backend, bundle)
    except BackendError as error:
        return Verification([], tolerances, not_run=str(error))
    with closing(opened):
        chunks = [min(chunk, opened.max_tokens or chunk) for chunk in prefill_chunks]
        answered = answered_prompts(step, prompts, max_new_tokens, on_progress, bundle.model.eos_token_ids)
        on_progress(Progress(f"comparing steps of {opened.name}"))
        checks = StepChecks(bundle, step, opened.name, opened, (), tolerances).run(answered, sizes, chunks)
    with MedusaEngine(bundle, open_backend(backend, bundle, check_digests=False), None) as engine:
        texts = sizes if step.is_exact else [1]  # larger trees may change the text: their rules allow it
        checks += generation_checks(engine, step, answered, texts, chunks, tolerances, on_progress)
    return Verification(checks, tolerances)


def _open_two_rows(backend: str, bundle: Bundle) -> Backend:
    """Opens a backend of two rows, or of one row if the engine holds no more."""
    rows = min(2, CompiledEngine.load(bundle.folder).limits.max_batch) if is_engine(bundle.folder) else 2
    return open_backend(backend, bundle, rows=rows, check_digests=False)

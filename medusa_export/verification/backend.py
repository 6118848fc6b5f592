"""Parity of a backend with PyTorch: a bundle on a GPU, or a compiled engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.step.step import MedusaStep
from medusa_export.verification.checks import Verification
from medusa_export.verification.generation import generation_checks
from medusa_export.verification.plan import Plan, VerifyOptions, check_same
from medusa_export.verification.reference_steps import ReferenceSteps
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
    options: VerifyOptions = VerifyOptions(),
    *,
    on_progress: OnProgress = ignore_progress,
) -> Verification:
    """Checks a backend against PyTorch. It compares no logits, because a compiled engine does not return them.

    Args:
        bundle: The bundle or the compiled engine that the backend runs.
        backend: The backend's name.
        step: The reference: the same model, heads and tree, computing in fp32.
        prompts: Token ids of each prompt.
        options: Options of the verification. Chunks are no longer than the backend's steps.
        on_progress: Receives reports.

    Returns:
        The outcome. ``not_run`` says why if this machine can't open the backend.

    Raises:
        VerificationError: The bundle has another model or tree than the step.
        BackendError: The backend failed in a step.
    """
    check_same(bundle, step)
    on_progress(Progress(f"opening {backend}"))
    try:
        opened = _open_two_rows(backend, bundle)
    except BackendError as error:
        return Verification([], options.tolerances(bundle), not_run=str(error))
    with closing(opened):
        chunks = [min(chunk, opened.max_tokens or chunk) for chunk in options.prefill_chunks]
        plan = Plan.answered(bundle, step, prompts, replace(options, prefill_chunks=chunks), on_progress)
        on_progress(Progress(f"comparing steps of {opened.name}"))
        reference = ReferenceSteps(step, opened.rows, most_kept=0)
        steps = StepChecks(bundle, reference, opened.name, opened, (), plan.rounded, rounds=bundle.weights.has_integers)
        checks = steps.run(plan.prompts, plan.sizes, plan.chunks)
    with MedusaEngine(bundle, open_backend(backend, bundle, check_digests=False), None) as engine:
        checks += generation_checks(engine, plan, on_progress)
    return plan.outcome(checks)


def _open_two_rows(backend: str, bundle: Bundle) -> Backend:
    """Opens a backend of two rows, or of one row if the engine holds no more."""
    rows = min(2, CompiledEngine.load(bundle.folder).limits.max_batch) if is_engine(bundle.folder) else 2
    return open_backend(backend, bundle, rows=rows, check_digests=False)

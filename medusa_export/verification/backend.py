"""Parity of a backend with PyTorch: a bundle on a GPU, or a compiled engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from medusa_export.step.step import MedusaStep
from medusa_export.verification.bundle import check_same, tree_sizes_of
from medusa_export.verification.checks import Progress, Tolerances, Verification
from medusa_export.verification.generation import generation_checks
from medusa_export.verification.reference import answered_prompts
from medusa_export.verification.steps import StepChecks
from medusa_runtime.backends import open_backend
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
    max_new_tokens: int = 32,
    tree_sizes: Sequence[int] | None = None,
    prefill_chunks: Sequence[int] = (512, 5),
    tolerances: Tolerances | None = None,
    progress: Progress = lambda _: None,
) -> Verification:
    """Holds a backend by name, with a bundle or a compiled engine, against PyTorch.

    Arguments are those of ``verify_bundle``. Logits are not compared, as a compiled engine keeps them to itself.

    Returns:
        The outcome; ``not_run`` says why if the backend can't be opened on this machine.

    Raises:
        VerificationError: The bundle is of another model or tree than the step.
        BackendError: The backend failed in a step.
    """
    check_same(bundle, step)
    tolerances = tolerances or Tolerances.of(bundle.dtype)
    sizes = tree_sizes_of(bundle, tree_sizes)
    progress(f"opening {backend}")
    try:
        opened = _open_two_rows(backend, bundle)
    except BackendError as error:
        return Verification([], tolerances, not_run=str(error))
    with closing(opened):
        chunks = [min(chunk, opened.max_tokens or chunk) for chunk in prefill_chunks]
        answered = answered_prompts(step, prompts, max_new_tokens, progress, bundle.model.eos_token_ids)
        progress(f"comparing steps of {opened.name}")
        checks = StepChecks(bundle, step, opened.name, opened, (), tolerances).run(answered, sizes, chunks)
    with MedusaEngine(bundle, open_backend(backend, bundle, check_digests=False), None) as engine:
        checks += generation_checks(engine, step, answered, sizes, chunks, tolerances, progress)
    return Verification(checks, tolerances)


def _open_two_rows(backend: str, bundle: Bundle) -> Any:
    """A backend of two rows, or of one where an engine holds no more."""
    rows = min(2, CompiledEngine.load(bundle.folder).limits.max_batch) if is_engine(bundle.folder) else 2
    return open_backend(backend, bundle, rows=rows, check_digests=False)

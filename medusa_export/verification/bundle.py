"""Parity of a bundle with PyTorch: step by step against the eager module, and end to end against transformers.

There are three kinds of checks, over real prompts:

* numbers: logits and head logits of teacher-forced steps;
* integers: all other outputs of a step, with drafts that are right down to every depth of the tree, prefill chunks of
  several sizes, and rows that prefill and decode side by side;
* tokens: whole generations against transformers' greedy ``generate``.

The reference has the bundle's weights and computes in fp32. If its two best logits are closer together than
``Tolerances.margin``, the choice between them is a tie. A tie is counted and shown, and is no failure.
"""

from __future__ import annotations

from collections.abc import Sequence

from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.step.step import MedusaStep
from medusa_export.verification.checks import Check, Verification
from medusa_export.verification.generation import generation_checks
from medusa_export.verification.plan import Plan, VerifyOptions, check_same
from medusa_export.verification.reference_steps import ReferenceSteps
from medusa_export.verification.steps import graph_checks
from medusa_runtime.bundles.bundle import GRAPH, GRAPHS, ONNXRUNTIME_CUDA_GRAPH, Bundle
from medusa_runtime.engine import MedusaEngine


def verify_bundle(
    bundle: Bundle,
    step: MedusaStep,
    prompts: Sequence[Sequence[int]],
    options: VerifyOptions = VerifyOptions(),
    *,
    on_progress: OnProgress = ignore_progress,
) -> Verification:
    """Checks every graph of a bundle against PyTorch, in ONNX Runtime on the CPU.

    Args:
        bundle: The bundle.
        step: The reference: the same model, heads and tree, computing in fp32.
        prompts: Token ids of each prompt.
        options: Options of the verification.
        on_progress: Receives reports.

    Returns:
        The outcome.

    Raises:
        VerificationError: The bundle has another model or tree than the step.
        BackendError: ONNX Runtime can't run the bundle.
    """
    check_same(bundle, step)
    plan = Plan.answered(bundle, step, prompts, options, on_progress)
    checks = _steps_of_graphs(bundle, plan, on_progress)
    with MedusaEngine.load(bundle.folder, check_digests=False) as engine:
        checks += generation_checks(engine, plan, on_progress)
    return plan.outcome(checks)


def _steps_of_graphs(bundle: Bundle, plan: Plan, on_progress: OnProgress) -> list[Check]:
    """Compares steps of each graph. The sessions take turns, as several may not fit in memory."""
    reference, checks = ReferenceSteps(plan.step, rows=2), []
    for graph in _graphs(bundle):
        on_progress(Progress(f"comparing steps of {graph}"))
        rounds = bundle.weights.has_integers and (graph != GRAPH or bundle.weights.activations is not None)
        tolerances = plan.rounded if rounds else plan.tolerances
        steps = graph_checks(bundle, reference, graph, tolerances, rounds=rounds or bundle.kv_cache is not None)
        checks += steps.run(plan.prompts, plan.sizes, plan.chunks)
    return checks


def _graphs(bundle: Bundle) -> list[str]:
    """The graphs that a CPU runs."""
    return [name for name in GRAPHS if name in bundle.files and name != ONNXRUNTIME_CUDA_GRAPH]

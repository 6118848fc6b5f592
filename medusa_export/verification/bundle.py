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

from medusa_export.common import defaults
from medusa_export.common.errors import VerificationError
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.step.step import MedusaStep
from medusa_export.verification.checks import Check, Tolerances, Verification
from medusa_export.verification.generation import generation_checks
from medusa_export.verification.reference import answered_prompts
from medusa_export.verification.steps import graph_checks
from medusa_runtime.bundles.bundle import GRAPHS, Bundle
from medusa_runtime.engine import MedusaEngine


def verify_bundle(
    bundle: Bundle,
    step: MedusaStep,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = defaults.VERIFIED_TOKENS,
    tree_sizes: Sequence[int] | None = None,
    prefill_chunks: Sequence[int] = defaults.PREFILL_CHUNKS,
    tolerances: Tolerances | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Verification:
    """Checks every graph of a bundle against PyTorch, in ONNX Runtime on the CPU.

    Args:
        bundle: The bundle.
        step: The reference: the same model, heads and tree, computing in fp32.
        prompts: Token ids of each prompt.
        max_new_tokens: Tokens to generate per prompt.
        tree_sizes: Tree sizes to decode with, in nodes; 1, a middle one and all if None.
        prefill_chunks: Chunk sizes, in tokens per step.
        tolerances: Differences that pass; by the bundle's dtype if None.
        on_progress: Receives reports.

    Returns:
        The outcome.

    Raises:
        VerificationError: The bundle has another model or tree than the step.
        BackendError: ONNX Runtime can't run the bundle.
    """
    check_same(bundle, step)
    tolerances = tolerances or Tolerances.of(bundle.dtype)
    sizes = tree_sizes_of(bundle, tree_sizes)
    answered = answered_prompts(step, prompts, max_new_tokens, on_progress, bundle.model.eos_token_ids)
    checks: list[Check] = []
    for graph in _graphs(bundle):
        on_progress(Progress(f"comparing steps of {graph}"))
        checks += graph_checks(bundle, step, graph, tolerances).run(answered, sizes, prefill_chunks)
    with MedusaEngine.load(bundle.folder, check_digests=False) as engine:
        texts = sizes if step.is_exact else [1]  # larger trees may change the text: their rules allow it
        checks += generation_checks(engine, step, answered, texts, prefill_chunks, tolerances, on_progress)
    return Verification(checks, tolerances)


def tree_sizes_of(bundle: Bundle, asked_for: Sequence[int] | None) -> list[int]:
    """Returns tree sizes in ascending order, each once; 1, a middle one and all if ``asked_for`` is None."""
    return sorted(set(asked_for or (1, (bundle.tree.size + 1) // 2, bundle.tree.size)))


def check_same(bundle: Bundle, step: MedusaStep) -> None:
    """Checks that a bundle and a step have the same model and tree.

    Raises:
        VerificationError: They differ.
    """
    for what, ours, theirs in (
        ("vocabulary", bundle.model.vocab_size, step.vocab_size),
        ("number of layers", bundle.model.num_layers, step.cache_shape.num_layers),
        ("tree", bundle.tree, step.tree),
    ):
        if ours != theirs:
            raise VerificationError(
                f"The bundle was exported from another model: its {what} is {ours}, not {theirs}. Give the model and "
                "the heads that it was exported from."
            )


def _graphs(bundle: Bundle) -> list[str]:
    return [name for name in GRAPHS if name in bundle.files]

"""Parity of a bundle with PyTorch: step by step against the eager module, and end to end against transformers.

Three kinds of checks, over real prompts:

* numbers: logits and head logits of teacher-forced steps;
* integers: everything else that a step gives, with drafts that are right to every depth of the tree, in
  prefill chunks of several sizes, over rows that prefill and decode side by side;
* tokens: whole generations against transformers' greedy ``generate``.

The reference has the bundle's weights and computes in fp32. Where its two best logits lie closer together
than ``Tolerances.margin``, the choice between them is a tie: it is counted and shown, and is no failure.
"""

from __future__ import annotations

from collections.abc import Sequence

from medusa_export.common.errors import VerificationError
from medusa_export.step.step import MedusaStep
from medusa_export.verification.checks import Check, Progress, Tolerances, Verification
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
    max_new_tokens: int = 32,
    tree_sizes: Sequence[int] | None = None,
    prefill_chunks: Sequence[int] = (512, 5),
    tolerances: Tolerances | None = None,
    progress: Progress = lambda _: None,
) -> Verification:
    """Holds a bundle against PyTorch.

    Args:
        bundle: The bundle.
        step: The same model, heads and tree, in fp32.
        prompts: Token ids.
        max_new_tokens: Tokens to generate per prompt.
        tree_sizes: Sizes to decode with; 1, a middle one and all if None.
        prefill_chunks: Tokens of a prompt per step.
        tolerances: What passes; by the bundle's dtype if None.
        progress: Told what is being done.

    Raises:
        VerificationError: The bundle is of another model or tree than the step.
        BackendError: ONNX Runtime can't run the bundle.
    """
    check_same(bundle, step)
    tolerances = tolerances or Tolerances.of(bundle.dtype)
    sizes = tree_sizes_of(bundle, tree_sizes)
    answered = answered_prompts(step, prompts, max_new_tokens, progress, bundle.model.eos_token_ids)
    checks: list[Check] = []
    for graph in _graphs(bundle):
        progress(f"comparing steps of {graph}")
        checks += graph_checks(bundle, step, graph, tolerances).run(answered, sizes, prefill_chunks)
    with MedusaEngine.load(bundle.folder, check_digests=False) as engine:
        texts = sizes if step.is_exact else [1]  # larger trees may change the text: their rules allow it
        checks += generation_checks(engine, step, answered, texts, prefill_chunks, tolerances, progress)
    return Verification(checks, tolerances)


def tree_sizes_of(bundle: Bundle, asked_for: Sequence[int] | None) -> list[int]:
    """The sizes to decode with, each once; 1, a middle one and all if none were asked for."""
    return sorted(set(asked_for or (1, (bundle.tree.size + 1) // 2, bundle.tree.size)))


def check_same(bundle: Bundle, step: MedusaStep) -> None:
    """Raises ``VerificationError`` unless a bundle and a step are of the same model and tree."""
    for what, ours, theirs in (
        ("vocabulary", bundle.model.vocab_size, step.vocab_size),
        ("number of layers", bundle.model.num_layers, step.cache_shape.num_layers),
        ("tree", bundle.tree, step.tree),
    ):
        if ours != theirs:
            raise VerificationError(
                f"The bundle is not of this model: its {what} is {ours}, not {theirs}. Give the model and the heads "
                "that it was exported from."
            )


def _graphs(bundle: Bundle) -> list[str]:
    return [name for name in GRAPHS if name in bundle.files]

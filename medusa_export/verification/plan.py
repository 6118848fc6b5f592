"""The plan of a verification: its options, and the prompts with the reference's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from medusa_export.common import defaults
from medusa_export.common.errors import VerificationError
from medusa_export.common.progress import OnProgress
from medusa_export.step.step import MedusaStep
from medusa_export.verification.checks import Check, Tolerances, Verification
from medusa_export.verification.reference import Prompt, answered_prompts
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.states import State


@dataclass(frozen=True)
class VerifyOptions:
    """Options of a verification.

    Attributes:
        max_new_tokens: Tokens to generate per prompt.
        tree_sizes: Tree sizes to decode with, in nodes; 1, a middle one and all if None.
        prefill_chunks: Chunk sizes, in tokens per step.
        margin: Largest difference between two logits that makes the choice between them a tie. If None, it depends on
            the bundle's types.
    """

    max_new_tokens: int = defaults.VERIFIED_TOKENS
    tree_sizes: Sequence[int] | None = None
    prefill_chunks: Sequence[int] = defaults.PREFILL_CHUNKS
    margin: float | None = None

    def tolerances(self, bundle: Bundle, *, rounds_activations: bool = False) -> Tolerances:
        """Returns the differences that pass for a bundle.

        Args:
            bundle: The bundle.
            rounds_activations: Products round their inputs to 8 bits.
        """
        found = Tolerances.of(bundle.dtype, rounds_activations=rounds_activations, kv_cache=bundle.kv_cache)
        return found if self.margin is None else replace(found, margin=self.margin)


@dataclass(frozen=True)
class Plan:
    """A verification that is ready to run.

    Attributes:
        step: The reference, computing in fp32.
        prompts: Prompts with the reference's answers.
        sizes: Tree sizes to decode with, in nodes, ascending.
        chunks: Chunk sizes, in tokens per step.
        tolerances: Differences that pass in the standard graph.
        rounded: Differences that pass where products may round their inputs: in derived graphs of bundles with
            matrices of integers, and in all graphs of bundles with rounded activations. Otherwise the same.
        own_reference: Trees and chunks are compared with plain decoding by the engine itself. They must give the same
            tokens, unless the backend says that rows differ: then other tokens must be ties in the reference. That
            plain decoding is compared with the reference.
    """

    step: MedusaStep
    prompts: Sequence[Prompt]
    sizes: Sequence[int]
    chunks: Sequence[int]
    tolerances: Tolerances
    rounded: Tolerances
    own_reference: bool = False

    @classmethod
    def answered(
        cls,
        bundle: Bundle,
        step: MedusaStep,
        prompts: Sequence[Sequence[int]],
        options: VerifyOptions,
        on_progress: OnProgress,
    ) -> Plan:
        """Has the reference answer the prompts, and returns the plan.

        Args:
            bundle: The bundle to check.
            step: The reference, computing in fp32.
            prompts: Token ids of each prompt.
            options: Options of the verification.
            on_progress: Receives reports.
        """
        tree = bundle.tree
        sizes = sorted(set(options.tree_sizes or (1, (tree.size + 1) // 2, tree.size)))
        answered = answered_prompts(step, prompts, options.max_new_tokens, on_progress, bundle.model.eos_token_ids)
        tolerances, integers = options.tolerances(bundle), bundle.weights.has_integers
        rounded = options.tolerances(bundle, rounds_activations=integers)
        own_reference = integers or (bundle.kv_cache is not None and bundle.has_exact_rows)
        return cls(step, answered, sizes, options.prefill_chunks, tolerances, rounded, own_reference)

    def outcome(self, checks: list[Check]) -> Verification:
        """Returns the outcome of the checks of this plan."""
        return Verification(checks, self.tolerances, rounded=self.rounded if self.rounded != self.tolerances else None)


def check_same(bundle: Bundle, step: MedusaStep) -> None:
    """Checks that a bundle and a step have the same model and tree.

    Raises:
        VerificationError: They differ.
    """
    for what, ours, theirs in (
        ("vocabulary", bundle.model.vocab_size, step.vocab_size),
        ("number of layers", bundle.model.num_layers, step.model.config.get_text_config().num_hidden_layers),
        ("list of states", _shapes(bundle.states), _shapes(step.states)),
        ("tree", bundle.tree, step.tree),
    ):
        if ours != theirs:
            raise VerificationError(
                f"The bundle was exported from another model: its {what} is {ours}, not {theirs}. Give the model and "
                "the heads that it was exported from."
            )


def _shapes(states: Sequence[State]) -> list[tuple[str, tuple[int, int]]]:
    return [(state.name, state.shape) for state in states]

"""Typical acceptance."""

from __future__ import annotations

from medusa_export.step.acceptance.rule import Verdict, VerifiedNodes


class TypicalRule:
    """Confirms a node whose token the base model finds likely enough, p > min(ε, alpha·exp(-H(p))) [2.3.1].

    It applies in rows whose ``typical_epsilon`` is above 0. The longest path wins; of several the one with the largest
    Σ log p. The threshold also limits the tokens that are drawn in these rows, so ``sampling.draw`` computes it.
    """

    name = "typical"
    changes_output = True
    needs_sampling = True

    def judge(self, nodes: VerifiedNodes) -> Verdict:
        assert nodes.sampled is not None
        return Verdict(nodes.sampled.typical, nodes.sampled.typical_logprobs)

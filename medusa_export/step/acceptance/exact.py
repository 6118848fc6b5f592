"""Exact acceptance."""

from __future__ import annotations

from medusa_export.step.acceptance.rule import Verdict, VerifiedNodes


class ExactRule:
    """Confirms a node whose token is the base model's own choice after its parent [2.1.2].

    The choice is the best token, or a drawn one in rows that sample. Drafts have no influence on it, so the text is
    that of the base model alone.
    """

    name = "exact"
    changes_output = False
    needs_sampling = False

    def judge(self, nodes: VerifiedNodes) -> Verdict:
        return Verdict(nodes.tokens == nodes.at_parents(nodes.chosen))

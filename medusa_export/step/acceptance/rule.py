"""The interface of an acceptance rule."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medusa_export.step.sampling import Sampled, SamplingInputs
from medusa_export.step.tree_tables import TreeTables


@dataclass(frozen=True)
class VerifiedNodes:
    """All that a rule can read about the nodes of a verified draft: B rows, R nodes each, V tokens.

    Attributes:
        tokens: [B, R], the token of each node. Node 0 is the root, which is already chosen.
        logits: [B, R, V], the base model's logits of the token after each node.
        chosen: [B, R], the token that the base model chose after each node: the best one, or a drawn one.
        tables: The lookup tables of the whole tree; the first R of its T nodes are verified.
        sampling: The sampling parameters of each row; None in a step that is greedy only.
        sampled: The draws of this step; None in a step that is greedy only.
    """

    tokens: Tensor
    logits: Tensor
    chosen: Tensor
    tables: TreeTables
    sampling: SamplingInputs | None = None
    sampled: Sampled | None = None

    def at_parents(self, values: Tensor) -> Tensor:
        """Values [B, R, ...] of each node's parent, in the place of the node. The root is its own parent."""
        return values.index_select(1, self.tables.parents[: self.tokens.shape[1]])


@dataclass(frozen=True)
class Verdict:
    """A rule's judgement of each verified node by itself.

    Attributes:
        confirmed: [B, R] boolean, True where the node's token may follow its parent. The root's value is not read.
        score: [B, R] float, the rank of the node among other confirmed nodes; None if the rule has no preference.
            Of the longest confirmed paths the step accepts the one with the largest sum of scores. Use 0 for nodes
            and rows that the rule doesn't confirm.
    """

    confirmed: Tensor
    score: Tensor | None = None


class AcceptanceRule(Protocol):
    """Decides which nodes of a draft may be accepted.

    A rule judges each node by itself, as if its parent were accepted. The step then accepts the longest path of
    confirmed nodes. A step with several rules confirms a node if one of them does.

    Attributes:
        name: The name in the registry and in a bundle's description.
        changes_output: True if the rule may confirm a token other than the base model's choice. The text is then not
            distributed as that of the base model.
        needs_sampling: True if the rule reads ``sampling`` or ``sampled``. A bundle that is greedy only leaves it out.
    """

    @property
    def name(self) -> str: ...

    @property
    def changes_output(self) -> bool: ...

    @property
    def needs_sampling(self) -> bool: ...

    def judge(self, nodes: VerifiedNodes) -> Verdict:
        """Judges all verified nodes. It is traced into the graph: use tensor operations, no branches on values."""
        ...


def judge(rules: tuple[AcceptanceRule, ...], nodes: VerifiedNodes) -> Verdict:
    """The verdict of several rules together: a node is confirmed if one rule confirms it, and scores are added."""
    verdicts = [rule.judge(nodes) for rule in rules]
    confirmed = functools.reduce(torch.logical_or, [verdict.confirmed for verdict in verdicts])
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    return Verdict(confirmed, functools.reduce(torch.add, scores) if scores else None)

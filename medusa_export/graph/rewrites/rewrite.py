"""The base class of rewrites."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from medusa_export.models.activations import ActivationRanges
from medusa_export.models.weight_types import WeightTypes


class NotApplicableError(ir.passes.PreconditionError):
    """A graph does not meet the precondition of a rewrite. The message is the reason, without a full stop."""


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """Facts about a step that its graph does not show.

    Attributes:
        margin: M, the depth of the tree: slots in front of each row's first entry.
        max_positions: Length of the longest sequence of the model, in tokens.
        capacity: C, slots per row, where it is fixed; None where each call chooses it.
        weights: How weights are stored.
        activations: Ranges of the inputs of products, for products of 8-bit integers; None for none.
        has_experts: True if layers are mixtures of experts. The tokens decide how many rows their products have.
        fused_attention: Keep the attention operators of ONNX Runtime in graphs whose rows would then differ.
    """

    margin: int
    max_positions: int
    capacity: int | None = None
    weights: WeightTypes = field(default_factory=WeightTypes)
    activations: ActivationRanges | None = None
    has_experts: bool = False
    fused_attention: bool = False


@dataclass
class RewriteResult(ir.passes.PassResult):
    """Result of a rewrite.

    Attributes:
        count: Number of places that were rewritten.
    """

    count: int


class Rewrite(ir.passes.InPlacePass):
    """A named change of a graph that keeps what it computes; a pass of onnx_ir that counts.

    A subclass sets ``name`` and implements ``apply``. It may override ``requires``, which raises ``NotApplicableError``
    for a graph that the rewrite can't take, before anything is changed.

    Args:
        step: Facts about the step.
    """

    name: ClassVar[str]

    def __init__(self, step: StepFacts) -> None:
        self.step = step

    @abc.abstractmethod
    def apply(self, model: ir.Model) -> int:
        """Rewrites a graph in place.

        Returns:
            The number of places that were rewritten.
        """

    def call(self, model: ir.Model) -> RewriteResult:
        count = self.apply(model)
        return RewriteResult(model, modified=count > 0, count=count)

"""Sampling inside a step: the distribution of each row, and a drawn token after each verified node.

The base model's logits are divided by the temperature and cut off by top-k, top-p and min-p, in this order, as in
transformers. What is left is the *processed* distribution p. One token is drawn from it per node, by a race
(``step.race``).

No operation here runs over more nodes than the host gave numbers for, so a step without any costs almost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from medusa_export.heads.sizes import sym_min
from medusa_export.step.constraints import ConstraintInputs, constrained
from medusa_export.step.indexing import take_entries, take_rows
from medusa_export.step.race import race
from medusa_runtime.bundles.contract import MAX_TOP_K

# Below the best logit: a vocabulary of such tokens weighs less than fp32 can resolve.
LEAST_LOGIT = -40.0
# The widths of an interval of logits that is halved until no two fp32 numbers lie between its ends.
HALVINGS = tuple(-LEAST_LOGIT * 0.5**halving for halving in range(1, 27))


@dataclass(frozen=True)
class SamplingInputs:
    """The inputs of the graph for sampling; see ``docs/contract.md``.

    Attributes:
        exponentials: [B, W, blocks + 256], numbers above 0. The token at place q of a text is drawn with row q mod W:
            its block of 256 tokens with the first numbers of the row, the token in the block with the others.
        temperature: [B]; 0 is greedy.
        top_k: [B]; 0 is off.
        top_p: [B]; 1 is off.
        min_p: [B]; 0 is off.
        typical_epsilon: [B], the ε of typical acceptance; 0 is exact acceptance.
        typical_alpha: [B], the alpha of typical acceptance.
        constraints: The inputs for biases, penalties and forbidden tokens.
    """

    exponentials: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_epsilon: Tensor
    typical_alpha: Tensor
    constraints: ConstraintInputs

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self:
        """The inputs from their tensors, in the order of the graph."""
        exponentials, temperature, top_k, top_p, min_p, epsilon, alpha, *constraints = tensors
        return cls(exponentials, temperature, top_k, top_p, min_p, epsilon, alpha, ConstraintInputs(*constraints))

    def tensors(self) -> list[Tensor]:
        """All inputs, in the order of the graph."""
        *own, constraints = vars(self).values()
        return [*own, *constraints.tensors()]


@dataclass(frozen=True)
class Drawn:
    """The draws of U nodes.

    Attributes:
        tokens: [B, U], the token drawn after each node; the best one in greedy rows.
        typical: [B, U] boolean, True where typical acceptance allows the node's own token after its parent.
        typical_logprobs: [B, U], log p of that token where it is allowed; 0 elsewhere.
        log_total: [B, U], log Σ exp(logits); logits minus this are the base model's own log p.
        beyond: [B, U, 1] boolean, True where the nucleus of top-p holds more than ``MAX_TOP_K`` tokens.
        nucleus_end: [B, U, 1], there the smallest logit of the nucleus, relative to the best one.
        constrained: [B, U, V] fp32, the logits after biases, penalties and bans.
    """

    tokens: Tensor
    typical: Tensor
    typical_logprobs: Tensor
    log_total: Tensor
    beyond: Tensor
    nucleus_end: Tensor
    constrained: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All values, in the order of the attributes."""
        return (
            self.tokens, self.typical, self.typical_logprobs, self.log_total, self.beyond, self.nucleus_end,
            self.constrained,
        )  # fmt: skip


@dataclass(frozen=True)
class Sampled:
    """The result of sampling for all R verified nodes. Nodes without a draw hold the values of a greedy step.

    Attributes:
        chosen: [B, R], the token after each node: a drawn one, or the best one.
        typical: [B, R], as in ``Drawn``; False without a draw.
        typical_logprobs: [B, R], as in ``Drawn``; 0 without a draw.
        log_total: [B, R], as in ``Drawn``; 0 without a draw.
        beyond: [B, U, 1], as in ``Drawn``.
        nucleus_end: [B, U, 1], as in ``Drawn``.
        constrained: [B, U, V], as in ``Drawn``.
    """

    chosen: Tensor
    typical: Tensor
    typical_logprobs: Tensor
    log_total: Tensor
    beyond: Tensor
    nucleus_end: Tensor
    constrained: Tensor


def sample(
    logits: Tensor, nodes: Tensor, parents: Tensor, ancestors: Tensor, places: Tensor, given: SamplingInputs
) -> Sampled:
    """Draws a token after each of the first U = min(R, W) nodes.

    Args:
        logits: [B, R, V], of the base model after each node.
        nodes: [B, R], the token of each node.
        parents: [T], the parent of each node of the whole tree.
        ancestors: [T, T] boolean, True at [n, m] where node m is n or between the root and n.
        places: [B, R], the place in its text of the token after each node.
        given: The inputs for sampling.
    """
    size, best = logits.shape[1], logits.argmax(-1)
    width = given.exponentials.shape[1]
    # A tracer takes min(1, W) for 1. So in a tree of one node the root is drawn for W times.
    num_drawn = width if len(parents) == 1 else sym_min(size, width)
    first = torch.arange(num_drawn).clamp(max=len(parents) - 1)
    number = places.index_select(1, first) % torch.full((1,), width, dtype=torch.int64).clamp(min=1)
    own = replace(given, exponentials=take_rows(given.exponentials, number))
    drawn = Drawn(
        *draw_nodes(
            logits.index_select(1, first),
            nodes.index_select(1, first),
            parents.index_select(0, first),
            ancestors.float().unsqueeze(0).index_select(1, first).index_select(2, first),
            own.tensors(),
        )
    )

    node = torch.arange(size)
    or_best = torch.where(node < num_drawn, node, node + num_drawn)
    or_none = node.clamp(max=num_drawn)
    none = 0 * given.temperature.unsqueeze(1)
    return Sampled(
        chosen=torch.cat([drawn.tokens, best], dim=1).index_select(1, or_best),
        typical=torch.cat([drawn.typical, none > 0], dim=1).index_select(1, or_none),
        typical_logprobs=torch.cat([drawn.typical_logprobs, none], dim=1).index_select(1, or_none),
        log_total=torch.cat([drawn.log_total, none], dim=1).index_select(1, or_none),
        beyond=drawn.beyond,
        nucleus_end=drawn.nucleus_end,
        constrained=drawn.constrained,
    )


def draw(logits: Tensor, nodes: Tensor, parents: Tensor, ancestors: Tensor, given: SamplingInputs) -> Drawn:
    """Draws a token after each of U nodes.

    Args:
        logits: [B, U, V], of the base model after each node.
        nodes: [B, U], the token of each node.
        parents: [U], the parent of each node.
        ancestors: [1, U, U] fp32, 1 at [0, n, m] where node m is n or between the root and n, and 0 elsewhere.
        given: The inputs for sampling; ``exponentials`` are those of each node, [B, U, blocks + 256].
    """
    logits = logits.float()
    log_total = _log_total(logits)
    logits = constrained(logits, nodes, ancestors, given.constraints)
    best = logits.argmax(-1, keepdim=True)
    # From here on values of a row are [B, 1, 1], and values of a node [B, U, 1].
    given = _of_rows(given)
    exponentials = given.exponentials
    draws, is_typical = given.temperature > 0, given.typical_epsilon > 0
    scaled = (logits - logits.amax(-1, keepdim=True)) / torch.where(draws, given.temperature, 1.0)
    weights = scaled.exp()
    cut = _cut_off(scaled, weights, given)
    weights = torch.where(scaled < cut.least, 0.0, weights)
    total = weights.sum(-1, keepdim=True)
    bar = torch.where(is_typical, _typical_bar(scaled, weights, total, given), -torch.inf)
    weights = torch.where((scaled > bar) | (scaled == 0), weights, 0.0)
    tokens = torch.where(draws, race(weights, exponentials), best)

    own = take_entries(scaled, parents, nodes).unsqueeze(-1)
    in_reach = (own >= cut.least.index_select(1, parents)) & ((own > bar.index_select(1, parents)) | (own == 0))
    typical = in_reach & is_typical
    logprobs = torch.where(typical, own - total.index_select(1, parents).log(), 0.0)
    return Drawn(
        tokens=tokens.squeeze(-1),
        typical=typical.squeeze(-1),
        typical_logprobs=logprobs.squeeze(-1),
        log_total=log_total.squeeze(-1),
        beyond=cut.beyond,
        nucleus_end=cut.nucleus_end,
        constrained=logits,
    )


@torch.library.custom_op("medusa_export::draw_nodes", mutates_args=())
def draw_nodes(
    logits: Tensor, nodes: Tensor, parents: Tensor, ancestors: Tensor, given: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``draw`` as one operator. It is the same in all steps, and its trace takes as long as the rest of a step's."""
    return draw(logits, nodes, parents, ancestors, SamplingInputs.of(given)).tensors()


@draw_nodes.register_fake
def _(
    logits: Tensor, nodes: Tensor, parents: Tensor, ancestors: Tensor, given: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs, log_total = (torch.empty_like(nodes, dtype=torch.float32) for _ in range(2))
    beyond, end = (torch.empty_like(logits[..., :1], dtype=dtype) for dtype in (torch.bool, torch.float32))
    typical, constrained = torch.empty_like(nodes, dtype=torch.bool), torch.empty_like(logits, dtype=torch.float32)
    return Drawn(torch.empty_like(nodes), typical, logprobs, log_total, beyond, end, constrained).tensors()


def _log_total(logits: Tensor) -> Tensor:
    """log Σ exp(logits) [B, U, 1] of logits [B, U, V]."""
    top = logits.amax(-1, keepdim=True)
    return (logits - top).exp().sum(-1, keepdim=True).log() + top


def _of_rows(given: SamplingInputs) -> SamplingInputs:
    """The inputs with the values of rows as [B, 1, 1]."""
    exponentials, *of_rows, constraints = vars(given).values()
    return SamplingInputs.of([exponentials, *(values.view(-1, 1, 1) for values in of_rows), *constraints.tensors()])


@dataclass(frozen=True)
class _CutOff:
    """The ends of top-k, top-p and min-p.

    Attributes:
        least: [B, U, 1], the smallest logit that is kept, relative to the best one.
        beyond: [B, U, 1] boolean, True where the nucleus of top-p holds more than ``MAX_TOP_K`` tokens.
        nucleus_end: [B, U, 1], the smallest logit of the nucleus where that is so.
    """

    least: Tensor
    beyond: Tensor
    nucleus_end: Tensor


def _cut_off(scaled: Tensor, weights: Tensor, given: SamplingInputs) -> _CutOff:
    """Finds where top-k, top-p and min-p end. Tokens of equal logits are kept or cut off together.

    Args:
        scaled: [B, U, V], logits relative to the best one.
        weights: [B, U, V], their exponentials.
        given: The inputs for sampling, [B, 1, 1] each.
    """
    most = min(MAX_TOP_K, scaled.shape[-1])
    best = scaled.topk(most, dim=-1).values
    rank = torch.arange(most)
    has_top_k, has_top_p = given.top_k > 0, given.top_p < 1
    kept = rank < torch.where(has_top_k, given.top_k, most)
    best_weights = torch.where(kept, best.exp(), 0.0)
    sums = best_weights.cumsum(-1)
    whole = best_weights.sum(-1, keepdim=True)
    mass = given.top_p * torch.where(has_top_k, whole, weights.sum(-1, keepdim=True))
    # A token is in the nucleus unless the tokens before it fill the nucleus.
    kept = kept & ((sums - best_weights < mass) | (rank == 0))
    least = torch.where(kept, best, torch.inf).amin(-1, keepdim=True)

    beyond = (whole < mass) & has_top_p & ~has_top_k
    end = nucleus_end(scaled, weights, mass)
    least = torch.where(beyond, end, least)
    least = torch.where(has_top_k | has_top_p, least, -torch.inf)
    return _CutOff(torch.maximum(least, given.min_p.log()), beyond, end)


@torch.library.custom_op("medusa_export::nucleus_end", mutates_args=())
def nucleus_end(scaled: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """Finds the smallest logit [B, U, 1] such that all larger ones weigh less than ``mass``, without sorting.

    ``end`` is the lower end of an interval that is halved: the logits above it weigh at least ``mass``. This is one
    operator because its trace takes longer than that of a decoder layer.

    Args:
        scaled: [B, U, V], logits relative to the best one.
        weights: [B, U, V], their exponentials.
        mass: [B, U, 1], the weight of the nucleus.
    """
    end = torch.full_like(mass, LEAST_LOGIT)
    for width in HALVINGS:
        middle = end + width
        above = torch.where(scaled > middle, weights, 0.0).sum(-1, keepdim=True)
        end = torch.where(above >= mass, middle, end)
    return torch.where(scaled > end, scaled, 0.0).amin(-1, keepdim=True)


@nucleus_end.register_fake
def _(scaled: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    return torch.empty_like(mass)


def _typical_bar(scaled: Tensor, weights: Tensor, total: Tensor, given: SamplingInputs) -> Tensor:
    """The typical threshold [2.3.1], as a logit relative to the best one, [B, U, 1].

    A token is typical if p > min(ε, alpha·exp(-H(p))). The processed distribution p is the weights [B, U, V] over their
    sum ``total``.
    """
    log_total = total.log()
    entropy = log_total - (weights * scaled.clamp(min=-100.0)).sum(-1, keepdim=True) / total
    return torch.minimum(given.typical_epsilon.log(), given.typical_alpha.log() - entropy) + log_total

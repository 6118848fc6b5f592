"""Drawing tokens inside a step: the distribution that a row samples from, and a token for each verified node.

The base model's logits are divided by the temperature and cut off by top-k, top-p and min-p, in this order, as
transformers does it; what is left is the *processed* distribution. One token is drawn from it per node, in a race: the
best of p / E wins, E being exponentially distributed numbers from the host. Which numbers hangs on the place of the
token in the text and not on the node or the step: exact sampling gives the same text with every tree, and without one.
And what rounding does to p changes the winner only where two are as near to each other as that. To invert the
cumulative sum is to have a border for each token of the vocabulary, all of which move with rounding.

Nothing here runs over more nodes than the host gave numbers for, so a step without any costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medusa_export.heads.modules import sym_min
from medusa_export.step.indexing import take_entries, take_rows
from medusa_runtime.bundles.contract import MAX_TOP_K, RACE_BLOCK, num_blocks

LEAST_LOGIT = -40.0  # below the best: a vocabulary of such tokens weighs less than fp32 can tell
# Widths of an interval of logits that is halved until no two in fp32 lie between its ends.
HALVINGS = tuple(-LEAST_LOGIT * 0.5**halving for halving in range(1, 27))


@dataclass(frozen=True)
class SamplingInputs:
    """The graph's inputs for sampling; see ``docs/contract.md``.

    Attributes:
        exponentials: [B, W, blocks + 256], above 0; the token at place q of a text is drawn with row q mod W: its block
            of 256 with the first of the row's numbers, the token in it with the others.
        temperature: [B]; 0 is greedy.
        top_k: [B]; 0 is off.
        top_p: [B]; 1 is off.
        min_p: [B]; 0 is off.
        typical_epsilon: [B], of typical acceptance; 0 is exact acceptance.
        typical_alpha: [B].
    """

    exponentials: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_epsilon: Tensor
    typical_alpha: Tensor


@dataclass(frozen=True)
class Sampled:
    """What sampling makes of R verified nodes; nodes beyond those that were drawn for hold what greedy steps need.

    Attributes:
        chosen: [B, R], the token that the base model has come to after each node: drawn, or the best one.
        support: [B, R], log p of each node's own token where typical acceptance allows it, else -inf.
        log_total: [B, R], the logarithm of the sum of exp(logits): what logits are above log p.
        beyond: [B, U, 1], where the nucleus of top-p holds more than ``MAX_TOP_K`` tokens.
        nucleus_end: [B, U, 1], the least logit of it, below the best one, where that is so.
    """

    chosen: Tensor
    support: Tensor
    log_total: Tensor
    beyond: Tensor
    nucleus_end: Tensor


def sample(logits: Tensor, nodes: Tensor, parents: Tensor, places: Tensor, given: SamplingInputs) -> Sampled:
    """Draws a token for each of the first U = min(R, W) nodes.

    Args:
        logits: [B, R, V], of the base model.
        nodes: [B, R], the tokens of the verified nodes.
        parents: [T], the node above each node of the whole tree; what stands for the root is of no importance.
        places: [B, R], where in its text the token after each node stands.
        given: What the host gave.
    """
    size, best = logits.shape[1], logits.argmax(-1)
    width = given.exponentials.shape[1]
    # A tracer takes the smaller of 1 and W for 1, so the root of a tree without others is drawn for W times.
    drawn = width if len(parents) == 1 else sym_min(size, width)
    first = torch.arange(drawn).clamp(max=len(parents) - 1)
    number = places.index_select(1, first) % torch.full((1,), width, dtype=torch.int64).clamp(min=1)
    own = replace(given, exponentials=take_rows(given.exponentials, number))
    tokens, support, log_total, beyond, end = draw_nodes(
        logits.index_select(1, first),
        best.index_select(1, first),
        nodes.index_select(1, first),
        parents.index_select(0, first),
        list(vars(own).values()),
    )

    node = torch.arange(size)
    or_best = torch.where(node < drawn, node, node + drawn)
    or_none = node.clamp(max=drawn)
    none = 0 * given.temperature.unsqueeze(1)
    return Sampled(
        chosen=torch.cat([tokens, best], dim=1).index_select(1, or_best),
        support=torch.cat([support, none - torch.inf], dim=1).index_select(1, or_none),
        log_total=torch.cat([log_total, none], dim=1).index_select(1, or_none),
        beyond=beyond,
        nucleus_end=end,
    )


def drawings(
    logits: Tensor, best: Tensor, nodes: Tensor, above: Tensor, given: SamplingInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draws a token for each of U nodes.

    Args:
        logits: [B, U, V].
        best: [B, U], their best tokens.
        nodes: [B, U], the tokens of the nodes themselves.
        above: [U], the node above each.
        given: What the host gave, with the numbers of each node, [B, U, blocks + 256], as ``exponentials``.

    Returns:
        The tokens, and what ``Sampled`` has of the nodes in ``support`` and ``log_total``, [B, U], and in ``beyond``
        and ``nucleus_end``.
    """
    # From here on what a row has is [B, 1, 1], and what a node has [B, U, 1].
    given = SamplingInputs(given.exponentials, *(row.view(-1, 1, 1) for row in list(vars(given).values())[1:]))
    draws, typical = given.temperature > 0, given.typical_epsilon > 0
    below, log_total = _below_best(logits)
    scaled = below / torch.where(draws, given.temperature, 1.0)
    weights = scaled.exp()
    least, beyond, end = _least_logit(scaled, weights, given)
    weights = torch.where(scaled < least, 0.0, weights)
    total = weights.sum(-1, keepdim=True)
    bar = torch.where(typical, _typical_bar(scaled, weights, total, given), -torch.inf)
    weights = torch.where((scaled > bar) | (scaled == 0), weights, 0.0)
    tokens = torch.where(draws, _race(weights, given.exponentials), best.unsqueeze(-1))

    own = take_entries(scaled, above, nodes).unsqueeze(-1)
    refused = (own < least.index_select(1, above)) | ~((own > bar.index_select(1, above)) | (own == 0)) | ~typical
    support = torch.where(refused, -torch.inf, own - total.index_select(1, above).log())
    return tokens.squeeze(-1), support.squeeze(-1), log_total.squeeze(-1), beyond, end


@torch.library.custom_op("medusa_export::draw_nodes", mutates_args=())
def draw_nodes(
    logits: Tensor, best: Tensor, nodes: Tensor, above: Tensor, given: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``drawings``, as an operator: it is the same in all steps, and a tracer takes as long for it as for the rest."""
    return drawings(logits, best, nodes, above, SamplingInputs(*given))


@draw_nodes.register_fake
def _(
    logits: Tensor, best: Tensor, nodes: Tensor, above: Tensor, given: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    support, log_total = (torch.empty_like(best, dtype=torch.float32) for _ in range(2))
    beyond, end = (torch.empty_like(logits[..., :1], dtype=dtype) for dtype in (torch.bool, torch.float32))
    return torch.empty_like(best), support, log_total, beyond, end


def lags(logits: Tensor, numbers: NDArray[np.float32], temperature: float, tokens: Sequence[int]) -> Tensor:
    """How far tokens [N] are behind the winners of their races, [N]: by so much p would have to be larger, as log p.

    Args:
        logits: [N, V].
        numbers: [N, blocks + 256], as ``Draws`` gives them.
        temperature: Nothing else shapes the distribution.
        tokens: [N].
    """
    count, vocab_size = logits.shape
    blocks = num_blocks(vocab_size)
    weights = torch.nn.functional.pad((logits / temperature).softmax(-1), (0, blocks * RACE_BLOCK - vocab_size))
    weights = weights.view(count, blocks, RACE_BLOCK)
    of_blocks, of_tokens = _by_race(torch.from_numpy(numbers), blocks)
    row, drawn = torch.arange(count), torch.as_tensor(tokens)
    block, place = drawn // RACE_BLOCK, drawn % RACE_BLOCK
    among_blocks = (weights.sum(-1) / of_blocks).log()
    inside = (weights[row, block] / of_tokens).log()
    behind: Tensor = among_blocks.amax(-1) - among_blocks[row, block] + inside.amax(-1) - inside[row, place]
    return behind


def _below_best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, U, V] in fp32 as far as they lie below the best one, and the logarithm of their sum [B, U, 1]."""
    logits = logits.float()
    top = logits.amax(-1, keepdim=True)
    below = logits - top
    return below, below.exp().sum(-1, keepdim=True).log() + top


def _least_logit(scaled: Tensor, weights: Tensor, given: SamplingInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The least logit, below the best, that top-k, top-p and min-p leave; with ``beyond`` and ``nucleus_end``.

    Tokens of equal logits stay or go together.

    Args:
        scaled: [B, U, V], below the best one.
        weights: Their exponentials.
        given: What the host gave.
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
    # A token is in the nucleus if those before it do not fill it.
    kept = kept & ((sums - best_weights < mass) | (rank == 0))
    least = torch.where(kept, best, torch.inf).amin(-1, keepdim=True)

    beyond = (whole < mass) & has_top_p & ~has_top_k
    end = nucleus_end(scaled, weights, mass)
    least = torch.where(beyond, end, least)
    least = torch.where(has_top_k | has_top_p, least, -torch.inf)
    return torch.maximum(least, given.min_p.log()), beyond, end


@torch.library.custom_op("medusa_export::nucleus_end", mutates_args=())
def nucleus_end(scaled: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """The least logit [B, U, 1] of which those above it weigh less than ``mass``, without sorting them.

    ``end`` is the lower bound of an interval that is halved: what lies above it weighs at least ``mass``. It is an
    operator, since a tracer takes longer for it than for a decoder layer.

    Args:
        scaled: [B, U, V], below the best one.
        weights: Their exponentials.
        mass: [B, U, 1].
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
    """What a logit, below the best, has to exceed in typical acceptance [2.3.1].

    p > min(ε, alpha exp(-H(p))) of the processed distribution p, whose weights [B, U, V] have the sum ``total``.
    """
    log_total = total.log()
    entropy = log_total - (weights * scaled.clamp(min=-100.0)).sum(-1, keepdim=True) / total
    return torch.minimum(given.typical_epsilon.log(), given.typical_alpha.log() - entropy) + log_total


def _race(weights: Tensor, exponentials: Tensor) -> Tensor:
    """Tokens [B, U, 1], each drawn as often as its part of the weights [B, U, V].

    The largest of w / E is that of w with probability w / Σ w, where all E are exponentially distributed. The block of
    the vocabulary is drawn first, by its sum, then the token in it, which takes fewer numbers than all at once.

    Args:
        weights: [B, U, V], at least 0, not all of them 0.
        exponentials: [B, U, blocks + 256].
    """
    batch, nodes, vocab_size = weights.shape
    blocks = num_blocks(vocab_size)
    weights = torch.nn.functional.pad(weights, (0, blocks * RACE_BLOCK - vocab_size))
    weights = weights.reshape(batch, nodes, blocks, RACE_BLOCK)
    of_blocks, of_tokens = _by_race(exponentials, blocks)
    block = (weights.sum(-1) / of_blocks).argmax(-1, keepdim=True)
    inside = take_rows(weights.flatten(0, 1), block.view(-1, 1)).view(batch, nodes, RACE_BLOCK)
    token: Tensor = block * RACE_BLOCK + (inside / of_tokens).argmax(-1, keepdim=True)
    return token


def _by_race(exponentials: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The numbers of blocks, and of the tokens in one."""
    place = torch.arange(blocks + RACE_BLOCK)  # a gather by constants: TensorRT computes the shape of a slice
    return exponentials.index_select(-1, place[:blocks]), exponentials.index_select(-1, place[blocks:])

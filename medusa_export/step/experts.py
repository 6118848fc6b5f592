"""Mixtures of experts: the products that their layers leave to us, as a torch custom op.

Routers are the model's own code. transformers' interface for experts then calls our function with the chosen experts;
``step.adapters.experts`` does so for families that don't use it. The function groups the pairs of a token and a chosen
expert by expert. So each expert multiplies the tokens that chose it, and no others, and no weights are copied.
``graph.experts`` makes standard ONNX nodes of each ``expert_products``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from medusa_export.compat.transformers import experts_layout, register_experts

EXPERTS_NAME = "medusa_export"


@torch.library.custom_op("medusa_export::expert_products", mutates_args=())
def expert_products(rows: Tensor, weights: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    """Multiplies each group of rows with the matrix of its expert.

    Args:
        rows: [P, K], the rows of the first expert, then those of the second, and so on.
        weights: A matrix for each expert: [E, K, N] if ``transposed``, else [E, N, K].
        counts: [E], the number of rows of each expert.
        transposed: True if matrices are stored as [K, N].

    Returns:
        [P, N].
    """
    matrices = weights if transposed else weights.transpose(1, 2)
    if rows.is_cuda:
        return products_of_all(rows, matrices, counts)
    groups = torch.split(rows, counts.tolist())
    return torch.cat([group @ matrix for group, matrix in zip(groups, matrices, strict=True)])


def products_of_all(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Multiplies all rows with the matrix of each expert, and keeps those of its group.

    On a GPU the sizes of the groups are values that the host would wait for, and a step that waits can't be captured.
    Arguments are those of ``expert_products``, with ``matrices`` as [E, K, N].
    """
    place, ends = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1), counts.cumsum(0)
    products = rows @ matrices[0]
    for expert in range(1, matrices.shape[0]):
        products = torch.where(place < ends[expert - 1], products, rows @ matrices[expert])
    return products


@expert_products.register_fake
def _(rows: Tensor, weights: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2 if transposed else 1])


@dataclass(frozen=True)
class Stack:
    """The matrices of a linear layer of each expert.

    Attributes:
        weights: [E, N, K], or [E, K, N] if ``transposed``.
        transposed: True if matrices are stored as [K, N].
        bias: [E, N]; None without one.
    """

    weights: Tensor
    transposed: bool = False
    bias: Tensor | None = None


@dataclass(frozen=True)
class Experts:
    """The parts of a module of experts.

    Attributes:
        inner: The layers that a hidden state is multiplied with first.
        outer: The layer after them.
        activate: Computes the input of ``outer`` from the outputs of ``inner``.
        finish: Computes the output of an expert from that of ``outer``.
    """

    inner: tuple[Stack, ...]
    outer: Stack
    activate: Callable[..., Tensor]
    finish: Callable[[Tensor], Tensor] = field(default_factory=nn.Identity)


@dataclass(frozen=True)
class Grouped:
    """The pairs of a token and an expert that it chose, P = T · k, in the order of experts.

    Attributes:
        chosen: [T, k], the experts that each token chose.
        experts: [P], the expert of each pair.
        order: [P], the place of each pair in ``chosen``.
        counts: [E], the number of pairs of each expert.
    """

    chosen: Tensor
    experts: Tensor
    order: Tensor
    counts: Tensor

    @property
    def tokens(self) -> Tensor:
        """The token of each pair, [P]."""
        return self.order // self.chosen.shape[1]

    def ungrouped(self, rows: Tensor) -> Tensor:
        """The rows [P, N] of all pairs by token, [T, k, N]."""
        place = torch.zeros_like(self.order).scatter(0, self.order, torch.arange(self.order.shape[0]))
        return rows[place].view(*self.chosen.shape, -1)


def grouped_by_expert(chosen: Tensor, num_experts: int) -> Grouped:
    """Groups the experts that tokens chose, [T, k]."""
    experts = chosen.reshape(-1)
    in_order, order = experts.sort()
    counts = (experts.unsqueeze(1) == torch.arange(num_experts)).to(torch.int64).sum(0)
    return Grouped(chosen, in_order, order, counts)


def mixture(experts: Experts, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Computes the weighted sum of the outputs of the experts that each token chose.

    Args:
        experts: The parts of the experts.
        hidden: [T, H], the hidden states of tokens, or any shape that ends in H.
        chosen: [T, k], the experts that each token chose.
        shares: [T, k], the factors of their outputs.

    Returns:
        The shape of ``hidden``.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    grouped = grouped_by_expert(chosen, experts.outer.weights.shape[0])
    given = rows[grouped.tokens]
    inner = experts.activate(*(_linear(stack, given, grouped) for stack in experts.inner))
    outputs = grouped.ungrouped(experts.finish(_linear(experts.outer, inner, grouped)))
    return (outputs * shares.unsqueeze(-1)).sum(1).to(hidden.dtype).view(hidden.shape)


def _linear(stack: Stack, rows: Tensor, grouped: Grouped) -> Tensor:
    products: Tensor = expert_products(rows, stack.weights, grouped.counts, stack.transposed)
    return products if stack.bias is None else products + stack.bias[grouped.experts]


def _experts_forward(module: nn.Module, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """The function that modules of experts call through transformers' interface, as ``mixture``."""
    layout = experts_layout(module)

    def stack(name: str) -> Stack:
        bias = getattr(module, f"{name}_bias") if layout.has_bias else None
        return Stack(getattr(module, name), layout.transposed, bias)

    experts = Experts((stack(layout.first),), stack("down_proj"), layout.activate, layout.finish)
    return mixture(experts, hidden, chosen, shares)


register_experts(EXPERTS_NAME, _experts_forward)

"""Mixtures of experts: the products that their layers leave to us, as a torch custom op.

Routers are the model's own code. transformers' interface for experts then calls our function with the chosen experts.
It groups the pairs of a token and a chosen expert by expert. So each expert multiplies the tokens that chose it, and no
others, and no weights are copied. ``graph.experts`` makes standard ONNX nodes of each ``expert_products``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medusa_export.compat.transformers import ExpertsLayout, experts_layout, register_experts

EXPERTS_NAME = "medusa_export"


@torch.library.custom_op("medusa_export::expert_products", mutates_args=())
def expert_products(rows: Tensor, weights: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    """Multiplies each group of rows with the matrix of its expert.

    Args:
        rows: [P, K], the rows of the first expert, then those of the second, and so on.
        weights: A matrix for each expert: [E, K, N] if ``transposed``, else [E, N, K].
        counts: [E], the number of rows of each expert.
        transposed: Whether matrices are stored as [K, N].

    Returns:
        [P, N].
    """
    matrices = weights if transposed else weights.transpose(1, 2)
    groups = torch.split(rows, counts.tolist())
    return torch.cat([group @ matrix for group, matrix in zip(groups, matrices, strict=True)])


@expert_products.register_fake
def _(rows: Tensor, weights: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2 if transposed else 1])


def _experts_forward(module: nn.Module, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """The function that modules of experts call through transformers' interface.

    Args:
        module: The experts.
        hidden: [T, H], the hidden states of tokens.
        chosen: [T, k], the experts that each token chose.
        shares: [T, k], the factors of their outputs.

    Returns:
        [T, H].
    """
    layout = experts_layout(module)
    experts = chosen.reshape(-1)
    in_order, order = experts.sort()
    counts = (experts.unsqueeze(1) == torch.arange(layout.num_experts)).to(torch.int64).sum(0)
    inner = _linear(module, layout.first, hidden[order // chosen.shape[1]], in_order, counts, layout)
    outer = _linear(module, "down_proj", layout.activate(inner), in_order, counts, layout)
    place = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0]))
    outputs = layout.finish(outer)[place].view(*chosen.shape, -1)
    return (outputs * shares.unsqueeze(-1)).sum(1).to(hidden.dtype)


def _linear(
    module: nn.Module, name: str, rows: Tensor, experts: Tensor, counts: Tensor, layout: ExpertsLayout
) -> Tensor:
    """Applies a linear layer of the experts. ``experts`` [P] are those of the rows, in ascending order."""
    products: Tensor = expert_products(rows, getattr(module, name), counts, layout.transposed)
    return products + getattr(module, f"{name}_bias")[experts] if layout.has_bias else products


register_experts(EXPERTS_NAME, _experts_forward)

"""Mixtures whose layers don't call transformers' interface for experts.

1. The experts of DBRX and Step 3.7 take the chosen experts and their factors, as the interface does. Their forward is
   replaced by the function of ``step.experts``, with their weights.
2. Llama 4 multiplies the inputs of experts with the router's scores, not their outputs. It computes all experts for all
   tokens, with inputs of zero where a token did not choose one. Its forward is replaced.
3. JetMoE groups tokens by expert as we do. Its products are replaced, and the numbers of tokens remain a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medusa_export.step.adapters.replacement import Replacement
from medusa_export.step.experts import Experts, Stack, expert_products, grouped_by_expert, mixture


def experts_adapter(module: nn.Module) -> Iterator[Replacement]:
    """Makes a mixture use the products of ``step.experts``."""
    name = type(module).__name__
    if name in _EXPERTS:
        yield Replacement(module, "forward", partial(mixture, _EXPERTS[name](module)))
    if name in _FORWARDS:
        yield Replacement(module, "forward", partial(_FORWARDS[name], module))


def _dbrx(module: Any) -> Experts:
    """The parts of ``DbrxExperts``. Its matrices are stored as one with the rows of all experts."""
    mlp = module.mlp
    gate, up, down = (weight.unflatten(0, (module.num_experts, -1)) for weight in (mlp.w1, mlp.v1, mlp.w2))
    return Experts(
        inner=(Stack(gate), Stack(up)),
        outer=Stack(down, transposed=True),
        activate=lambda gate, up: mlp.activation_fn(gate) * up,
    )


def _step3p7(module: Any) -> Experts:
    """The parts of ``Step3p7Experts``."""
    return Experts((Stack(module.gate_up_proj),), Stack(module.down_proj), module._apply_gate)  # noqa: SLF001


def _llama4(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """``Llama4TextMoe.forward``."""
    hidden = hidden.reshape(-1, module.hidden_dim)
    scores, logits = module.router(hidden)
    shares, chosen = scores.topk(module.top_k, dim=1)
    experts = module.experts
    grouped = grouped_by_expert(chosen, module.num_experts)
    inputs = hidden[grouped.tokens] * shares.reshape(-1)[grouped.order].unsqueeze(1)
    gate, up = expert_products(inputs, experts.gate_up_proj, grouped.counts, True).chunk(2, dim=-1)
    outputs = expert_products(up * experts.act_fn(gate), experts.down_proj, grouped.counts, True)
    return module.shared_expert(hidden) + grouped.ungrouped(outputs).sum(1), logits


def _jetmoe_products(module: Any, inputs: Tensor, expert_size: Tensor) -> Tensor:
    """``JetMoeParallelExperts.forward``."""
    products: Tensor = expert_products(inputs, module.weight, expert_size, False)
    return products


def _jetmoe_gating(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``JetMoeTopKGating.forward``, with the number of tokens of each expert as a tensor."""
    logits = module.layer(hidden).float()
    top, chosen = logits.topk(module.top_k, dim=1)
    gates = torch.softmax(top, dim=1).type_as(hidden)
    grouped = grouped_by_expert(chosen, module.num_experts)
    return grouped.order, grouped.tokens, gates.flatten()[grouped.order], grouped.counts, logits


_EXPERTS: dict[str, Callable[[Any], Experts]] = {"DbrxExperts": _dbrx, "Step3p7Experts": _step3p7}
_FORWARDS: dict[str, Callable[..., object]] = {
    "Llama4TextMoe": _llama4,
    "JetMoeParallelExperts": _jetmoe_products,
    "JetMoeTopKGating": _jetmoe_gating,
}

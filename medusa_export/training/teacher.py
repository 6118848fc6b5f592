"""The base model as a teacher: computes its logits from hidden states that were kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.errors import TrainingError
from medusa_export.training.features import hidden_states

# Allowed error as a share of the largest logit; rounding to bfloat16 loses less.
_TOLERANCE = 0.05


class Teacher(nn.Module):
    """The part of the base model that follows its last hidden state. It is not trained.

    Args:
        model: The base model.
        token_map: The tokens to compute logits for, [V']; all if None.

    Raises:
        TrainingError: This class can't reproduce the model's logits.
    """

    rows: Tensor
    bias: Tensor | None

    def __init__(self, model: PreTrainedModel, token_map: Tensor | None) -> None:
        super().__init__()
        lm_head = model.get_output_embeddings()
        chosen = slice(None) if token_map is None else token_map.to(lm_head.weight.device)
        bias = getattr(lm_head, "bias", None)
        self.register_buffer("rows", lm_head.weight.detach()[chosen], persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach()[chosen], persistent=False)
        config = model.config.get_text_config()
        self._scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)  # Cohere, Granite
        self._softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
        self._check(model, chosen)

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """Computes logits [..., V'] in fp32 from hidden states [..., H]."""
        logits = nn.functional.linear(hidden.to(self.rows.dtype), self.rows, self.bias).float() * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    @torch.no_grad()
    def _check(self, model: PreTrainedModel, chosen: slice | Tensor) -> None:
        ids = torch.arange(8, device=model.device).unsqueeze(0)
        everywhere = torch.ones_like(ids)
        hidden, logits = hidden_states(model, ids, everywhere, everywhere.bool())
        expected = logits[0][:, chosen].float()
        if not expected.isfinite().all():
            raise TrainingError(
                f"{type(model).__name__} gives logits that are not finite: check its weights, or use `dtype='fp32'`."
            )
        if (self(hidden[0]) - expected).abs().max() > _TOLERANCE * expected.abs().max():
            raise TrainingError(
                f"{type(model).__name__} changes the output of its lm_head in a way that is not supported: train "
                "with `soft=0`."
            )

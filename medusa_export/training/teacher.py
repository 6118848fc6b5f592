"""What the base model would say itself: its distribution, from the hidden states that were kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.errors import TrainingError
from medusa_export.training.features import hidden_states

# Of the largest logit: more than bfloat16 loses on the way.
_TOLERANCE = 0.05


class Teacher(nn.Module):
    """The base model from its last hidden state on.

    Args:
        model: The base model; nothing of it is trained.
        token_map: The tokens of interest, [V']; all if None.

    Raises:
        TrainingError: The model makes logits in a way that isn't known here.
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
        """Logits [..., V'] in fp32 from hidden states [..., H]."""
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
                f"{type(model).__name__} gives logits that are not finite numbers: check its weights, or take "
                "--dtype fp32."
            )
        if (self(hidden[0]) - expected).abs().max() > _TOLERANCE * expected.abs().max():
            raise TrainingError(
                f"It is not known how {type(model).__name__} makes logits of what its lm_head gives: train without "
                "--soft."
            )

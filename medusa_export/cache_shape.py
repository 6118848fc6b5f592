"""The shape of a model's KV caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from transformers import PreTrainedModel


@dataclass(frozen=True)
class CacheShape:
    """Layers, key/value heads per layer, and the size of a head; the same for all layers."""

    num_layers: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Reads the config, whose families leave some of it to be derived."""
        config = model.config.get_text_config()
        return cls(
            num_layers=config.num_hidden_layers,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )

    @property
    def num_caches(self) -> int:
        """Keys and values of each layer."""
        return 2 * self.num_layers

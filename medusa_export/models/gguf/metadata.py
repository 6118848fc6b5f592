"""The metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_export.common.errors import CheckpointError

# Tensors that divide rotary frequencies: of Llama 3.1's scaling, and of LongRoPE for long and for short requests.
ROPE_FREQS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_FACTORS = (ROPE_FREQS, LONG_FACTORS, SHORT_FACTORS)


@dataclass(frozen=True)
class Metadata:
    """The metadata of a GGUF file, and the names of its tensors.

    Attributes:
        source: The file, for messages.
        values: The value of each key; of the tokenizer's keys only its model and the ids of single tokens.
        tensors: The names of the tensors.
        factors: The tensors that divide rotary frequencies, [rotated // 2], by name.
    """

    source: str
    values: Mapping[str, Any]
    tensors: frozenset[str]
    factors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    architecture: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "architecture", str(self.values.get("general.architecture")))

    @classmethod
    def of(cls, source: str, reader: Any) -> Metadata:
        """Reads the metadata of a file that ``gguf.GGUFReader`` opened."""
        values = {key: entry.contents() for key, entry in reader.fields.items() if _is_kept(key)}
        factors = {
            tensor.name: np.array(tensor.data, np.float32).reshape(-1)
            for tensor in reader.tensors
            if tensor.name in ROPE_FACTORS
        }
        return cls(source, values, frozenset(tensor.name for tensor in reader.tensors), factors)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key of the architecture."""
        return self.values.get(f"{self.architecture}.{name}", default)

    def error(self, words: str) -> CheckpointError:
        """An error about this file."""
        return CheckpointError(
            f"The GGUF file {self.source} {words}. Give the model's folder in Hugging Face's layout instead."
        )


def _is_kept(key: str) -> bool:
    """True unless a key holds the tokenizer's vocabulary or a chat template."""
    return not key.startswith("tokenizer.") or key == "tokenizer.ggml.model" or key.endswith("_token_id")

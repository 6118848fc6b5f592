"""The ranges of the inputs of linear layers, for products that round their inputs to 8 bits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from medusa_export.common.errors import CheckpointError
from medusa_export.common.files import write_bytes

_FORMAT = "medusa-export activations 1"
_MAXIMA, _ERROR = ".maxima", ".error"
# The exponent of the factors that make the ranges of columns alike before they are rounded: 0 leaves the ranges as they
# are, 1 makes them equal. The weights are multiplied by the factors.
_EVENNESS = 0.65
_SMALLEST = 1e-5
# Values of 8 bits on each side of zero.
_TOP = 127


@dataclass(frozen=True)
class InputRange:
    """The range of the input x [N, K] of a linear layer.

    Attributes:
        maxima: The largest |x| of each column, [K].
        error: Mean over tokens of |x - rounded x|² / |x|²; it is large if a few tokens have far larger values.
    """

    maxima: Tensor
    error: float = 0.0

    @functools.cached_property
    def factors(self) -> Tensor:
        """Factors of columns, [K]: x is divided by them before it is rounded, and weights are multiplied."""
        floor = float(self.maxima.max()) * _SMALLEST or 1.0
        powers = self.maxima.clamp(min=floor) ** _EVENNESS
        return powers / powers.log().mean().exp()

    @property
    def scale(self) -> float:
        """The step of the rounded values of x / factors."""
        return float((self.maxima / self.factors).max()) / _TOP or 1.0

    def rounded(self, values: Tensor) -> Tensor:
        """Rounds an input as the product does."""
        steps = (self.factors * self.scale).to(values)
        return (values / steps).round().clamp(-_TOP - 1, _TOP) * steps

    @classmethod
    def joined(cls, parts: Sequence[InputRange]) -> InputRange:
        """The range of an input of several layers."""
        maxima = torch.stack([part.maxima for part in parts]).amax(0)
        return cls(maxima, max(part.error for part in parts))


@dataclass(frozen=True)
class ActivationRanges:
    """The ranges of the inputs of a model's linear layers.

    Attributes:
        inputs: The ranges, by the name of the layer's weight.
        model: Name of the model.
        tokens: Number of tokens that were seen.
    """

    inputs: Mapping[str, InputRange] = field(default_factory=dict)
    model: str = ""
    tokens: int = 0

    def save(self, target: Path) -> None:
        """Writes the ranges as safetensors.

        Raises:
            OutputError: The file can't be written.
        """
        tensors = {name + _MAXIMA: one.maxima.float().clone() for name, one in self.inputs.items()}
        tensors |= {name + _ERROR: torch.tensor([one.error]) for name, one in self.inputs.items()}
        facts = {"format": _FORMAT, "model": self.model, "tokens": str(self.tokens)}
        write_bytes(target, serialized(tensors, facts))

    @classmethod
    def load(cls, source: Path) -> ActivationRanges:
        """Reads a file that ``save`` wrote.

        Raises:
            CheckpointError: The file can't be read, or is another one.
        """
        try:
            with safe_open(source, "pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"The activation ranges in {source} can't be read: {error}.") from error
        if facts.get("format") != _FORMAT:
            raise CheckpointError(f"{source} holds no activation ranges: give a file of 'medusa-export activations'.")
        inputs: dict[str, InputRange] = {}
        for name in [name.removesuffix(_MAXIMA) for name in tensors if name.endswith(_MAXIMA)]:
            maxima, lost = tensors[name + _MAXIMA], tensors.get(name + _ERROR)
            if maxima.ndim != 1 or not maxima.isfinite().all() or (maxima < 0).any() or lost is None:
                raise CheckpointError(f"{source} is damaged: the range of {name} can't be used. Measure again.")
            inputs[name] = InputRange(maxima, float(lost[0]))
        return cls(inputs, facts.get("model", ""), int(facts.get("tokens", "0")))

"""Activations that ONNX has no operator for.

The sparse activations of Gemma 3n take the quantile of a normal distribution from a constant. It is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from medusa_export.step.adapters.replacement import Replacement


def activation_adapter(module: nn.Module) -> Iterator[Replacement]:
    """Replaces the sparse activations of Gemma 3n."""
    if type(module).__name__ == "Gemma3nTextMLP":
        yield Replacement(module, "_gaussian_topk", partial(_largest, module))


def _largest(mlp: Any, inputs: Tensor) -> Tensor:
    """``Gemma3nTextMLP._gaussian_topk``: sets all but the largest activations to zero.

    The limit is a quantile of the normal distribution that has their mean and deviation.
    """
    deviations = NormalDist().inv_cdf(mlp.activation_sparsity)
    cutoff = inputs.mean(-1, keepdim=True) + inputs.std(-1, keepdim=True, unbiased=False) * deviations
    return torch.relu(inputs - cutoff)

"""Heads whose weights may still be in their file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from medusa_export.compat.lazy_loading import with_placeholders
from medusa_export.heads.base import DraftHeads
from medusa_export.models.checkpoint import Readers


@dataclass(frozen=True)
class LoadedHeads:
    """Heads, and functions that read those of their weights that are still in a file.

    Attributes:
        heads: The heads.
        readers: Functions that read the weights that are still in the file, by the weights' names in the heads. In the
            heads these weights are on the device ``meta``, or placeholders (``with_placeholders``).
    """

    heads: DraftHeads
    readers: Readers = field(default_factory=dict)

    def prepared(self, dtype: torch.dtype) -> LoadedHeads:
        """The same heads for use with a model: in its dtype, in eval mode, and with placeholders that can be traced.

        Args:
            dtype: The dtype of the model.
        """
        heads = self.heads.to(dtype=dtype).eval().requires_grad_(False)
        with_placeholders(heads)
        return LoadedHeads(heads, {name: partial(_in_dtype, read, dtype) for name, read in self.readers.items()})

    def in_memory(self) -> DraftHeads:
        """Reads the weights that are still in the file into the heads, and returns the heads."""
        for name, read in self.readers.items():
            self.heads.get_parameter(name).data = read()
        return self.heads

    def truncated(self, num_heads: int) -> LoadedHeads:
        """The first heads alone, as ``DraftHeads.truncated`` makes them.

        Args:
            num_heads: The number of heads to keep.
        """
        if type(self.heads).truncated is not DraftHeads.truncated:  # it may need the values of the weights
            return LoadedHeads(self.in_memory().truncated(num_heads))
        kept = self.heads.truncated(num_heads)
        lengths = {name: len(weight) for name, weight in kept.named_parameters()}
        readers = {name: read for name, read in self.readers.items() if name in lengths}
        return LoadedHeads(kept, {name: partial(_first, read, lengths[name]) for name, read in readers.items()})


def _in_dtype(read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return read().to(dtype)


def _first(read: Callable[[], Tensor], length: int) -> Tensor:
    return read()[:length]

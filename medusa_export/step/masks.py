"""The attention masks of a step, one for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medusa_export.step.alibi import Alibi, RoundedAlibi


@dataclass(frozen=True)
class MaskKind:
    """The properties of a layer that its mask depends on.

    Attributes:
        window: Tokens that a token attends to, itself included; None for all.
        chunk: Size of the chunks of a text, in tokens. A token attends to its own chunk only. None without chunks.
        bias: The biases of the scores; None without them.
        dtype: Type of the biases.
    """

    window: int | None = None
    chunk: int | None = None
    bias: Alibi | RoundedAlibi | None = None
    dtype: torch.dtype | None = None


class StepMasks:
    """The attention masks of a step.

    Args:
        full: [B, 1, S, C] boolean, True where a new token attends to an entry in layers that see everything.
        positions: Gives the positions of the new tokens, [B, S], and of the entries, [B, C]. It is called only if the
            mask of a layer depends on them.
    """

    def __init__(self, full: Tensor, positions: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.full = full
        self.positions = positions
        self._made: dict[MaskKind, Tensor] = {}

    def of(self, kind: MaskKind) -> Tensor:
        """The mask of a kind of layers, [B, 1, S, C] boolean; with biases numbers, [B, num_attention_heads, S, C]."""
        if kind not in self._made:
            self._made[kind] = self._make(kind)
        return self._made[kind]

    def _make(self, kind: MaskKind) -> Tensor:
        mask = self.full
        if kind.window is not None:
            mask = mask & (self._distances() < kind.window).unsqueeze(1)
        if kind.chunk is not None:
            new, entries = (torch.div(part, kind.chunk, rounding_mode="trunc") for part in self.positions())
            mask = mask & (new.unsqueeze(2) == entries.unsqueeze(1)).unsqueeze(1)
        if kind.bias is not None:
            assert kind.dtype is not None
            mask = torch.where(mask, kind.bias.of(*self.positions(), kind.dtype), torch.finfo(kind.dtype).min)
        return mask

    def _distances(self) -> Tensor:
        """The distance in positions from each entry up to each new token, [B, S, C]."""
        new, entries = self.positions()
        return new.unsqueeze(2) - entries.unsqueeze(1)

    def note(self, module: nn.Module, key: Tensor, given: Tensor | None, kind: MaskKind) -> None:
        """Called with each layer that attends, its keys, the model's mask for it, and the kind of the step's mask."""

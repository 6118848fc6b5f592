"""MEDUSA heads: from the last hidden state, guess the tokens that follow the next one.

Head k (k = 1..K) predicts the token k + 1 places ahead: softmax(W2 (SiLU(W1 h + b1) + h))
(arXiv 2401.10774, section 2.1.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

# The size of a dimension: an int, or a symbolic one while a graph is traced.
Size = int


def sym_min(a: Size, b: Size) -> Size:
    """The smaller size, symbolic if one of them is."""
    size: Size = torch.sym_min(a, b)  # type: ignore[no-untyped-call]
    return size


def sym_max(a: Size, b: Size) -> Size:
    """The larger size, symbolic if one of them is."""
    size: Size = torch.sym_max(a, b)  # type: ignore[no-untyped-call]
    return size


@dataclass(frozen=True)
class HeadsConfig:
    """The shape of a set of heads.

    Attributes:
        num_heads: K.
        num_layers: Residual blocks per head.
        hidden_size: H of the base model.
        draft_vocab_size: How many tokens a head can propose, V unless the draft vocabulary is reduced.
        shared_lm_head: The heads project with the base model's ``lm_head`` instead of their own.
        reduced_vocab: A ``token_map`` leads from draft tokens to the tokens of the base model.
    """

    num_heads: int
    num_layers: int
    hidden_size: int
    draft_vocab_size: int
    shared_lm_head: bool = False
    reduced_vocab: bool = False

    @property
    def variant(self) -> str:
        """The kind of head in words."""
        kind = "shared lm_head" if self.shared_lm_head else "own projection per head"
        return f"{kind}, reduced vocabulary" if self.reduced_vocab else kind


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), W starting at 0 so that a fresh head copies the base model."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + nn.functional.silu(self.linear(hidden))


class MedusaHeads(nn.Module):
    """K heads over one hidden state.

    Args:
        config: Their shape.
        lm_head: The base model's output projection, used where the heads have none of their own.
    """

    token_map: Tensor | None

    def __init__(self, config: HeadsConfig, lm_head: nn.Linear | None = None) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(config.hidden_size) for _ in range(config.num_layers)))
            for _ in range(config.num_heads)
        )
        self.projections: nn.ModuleList | None = None
        if config.shared_lm_head:
            if lm_head is None:
                raise ValueError("Heads with a shared lm_head need the base model's lm_head.")
            # In a tuple, so that the base model's weight is not registered here a second time.
            self._shared = (lm_head,)
        else:
            self.projections = nn.ModuleList(
                nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False) for _ in range(config.num_heads)
            )
        self.register_buffer(
            "token_map", torch.arange(config.draft_vocab_size) if config.reduced_vocab else None, persistent=True
        )

    @classmethod
    def fresh(cls, num_heads: int, lm_head: nn.Linear) -> MedusaHeads:
        """Untrained heads as the paper starts them: W1 = 0, and W2 the base model's ``lm_head``."""
        vocab_size, hidden_size = lm_head.weight.shape
        config = HeadsConfig(num_heads, 1, hidden_size, vocab_size, shared_lm_head=True)
        return cls(config, lm_head).to(dtype=lm_head.weight.dtype)

    def truncated(self, num_heads: int) -> MedusaHeads:
        """The first ``num_heads`` heads, for a tree that is no deeper; the modules are these, not copies.

        Raises:
            ValueError: There are not that many.
        """
        if not 1 <= num_heads <= self.config.num_heads:
            raise ValueError(f"{num_heads} of {self.config.num_heads} heads can't be kept: choose 1 to that number.")
        with torch.device("meta"):  # replaced below
            kept = MedusaHeads(replace(self.config, num_heads=num_heads), getattr(self, "_shared", (None,))[0])
        kept.blocks = self.blocks[:num_heads]
        kept.projections = None if self.projections is None else self.projections[:num_heads]
        kept.token_map = self.token_map
        return kept.train(self.training)

    def forward(self, hidden: Tensor, active: Size | None = None) -> Tensor:
        """Draft logits of the first ``active`` heads.

        Args:
            hidden: [B, H], the base model's last hidden state at the token to draft from.
            active: How many heads to run; all of them if None.

        Returns:
            [B, active, draft_vocab_size].
        """
        active = self.config.num_heads if active is None else active
        # With no head active all of this runs over no rows: no weight is read.
        hidden = hidden.unsqueeze(1)[:, : sym_min(active, 1)]
        states = [block(hidden) for block in self.blocks]
        if self.projections is None:
            logits: Tensor = self._shared[0](torch.cat(states, dim=1)[:, :active])
            return logits
        # Likewise the large matrix of each head beyond `active`.
        rows = [sym_max(sym_min(active - k, 1), 0) for k in range(self.config.num_heads)]
        return torch.cat(
            [project(state[:, :n]) for project, state, n in zip(self.projections, states, rows, strict=True)], dim=1
        )

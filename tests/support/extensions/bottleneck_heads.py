"""A head architecture: each head adds a correction of low rank to the hidden state."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from medusa_export.heads.architecture import HeadArchitecture, register_architecture
from medusa_export.heads.base import DraftHeads, HeadsConfig
from medusa_export.heads.sizes import Size


@dataclass(frozen=True)
class BottleneckConfig(HeadsConfig):
    """The shape of bottleneck heads.

    Attributes:
        rank: The rank of each head's correction.
    """

    rank: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= self.hidden_size:
            raise ValueError(f"rank is {self.rank}: expected 1 to {self.hidden_size}")


class BottleneckHeads(DraftHeads):
    """Heads lm_head(h + Up SiLU(Down h)). Up starts at 0, so fresh heads copy the base model."""

    architecture = "bottleneck"
    config: BottleneckConfig

    def __init__(self, config: BottleneckConfig, lm_head: nn.Linear) -> None:
        super().__init__(config, lm_head)
        heads, size, rank = config.num_heads, config.hidden_size, config.rank
        self.down = nn.Parameter(torch.randn(heads, size, rank) / size**0.5)
        self.up = nn.Parameter(torch.zeros(heads, rank, size))

    @property
    def shares_lm_head(self) -> bool:
        return True

    def forward(self, hidden: Tensor, embedded: Tensor | None = None, active: Size | None = None) -> Tensor:
        head = torch.arange(self.config.num_heads if active is None else active, device=hidden.device)
        down, up = self.down.index_select(0, head), self.up.index_select(0, head)
        states = hidden + torch.matmul(nn.functional.silu(torch.matmul(hidden.unsqueeze(0), down)), up)
        logits: Tensor = self.lm_head(states.transpose(0, 1).to(self.lm_head.weight.dtype))
        return logits


ARCHITECTURE = register_architecture(HeadArchitecture(BottleneckConfig, BottleneckHeads))

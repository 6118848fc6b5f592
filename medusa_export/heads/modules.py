"""MEDUSA heads: they propose the tokens after the next one from the last hidden state.

Head k (k = 1..K) proposes the token k + 1 positions ahead: softmax(W2 (SiLU(W1 h + b1) + h))
(arXiv 2401.10774, section 2.1.1). *Conditioned* heads also read the embedding e of the next root, which the base model
has chosen by then: SiLU(W1 h + U e + b1) in their first block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from medusa_export.heads.base import DraftHeads, HeadsConfig
from medusa_export.heads.sizes import Size, sym_max, sym_min


@dataclass(frozen=True)
class MedusaConfig(HeadsConfig):
    """The shape of a set of MEDUSA heads.

    Attributes:
        num_layers: The number of residual blocks per head.
        shared_lm_head: The heads project with the base model's ``lm_head``. They have no projection of their own.
        one_projection: All heads have one projection in common, which is not the ``lm_head`` itself.
    """

    num_layers: int = field(default=1, kw_only=True)
    shared_lm_head: bool = field(default=False, kw_only=True)
    one_projection: bool = field(default=False, kw_only=True)

    @property
    def variant(self) -> str:
        """The options in words."""
        kinds = {self.shared_lm_head: "shared lm_head", self.one_projection: "one projection"}
        words = [kinds.get(True, "own projection per head")]
        if self.reduced_vocab:
            words.append(f"vocabulary of {self.draft_vocab_size:,}")
        if self.conditioned:
            words.append("conditioned on the next token")
        return ", ".join(words)


class ResidualLayer(nn.Module):
    """A residual block, x + SiLU(W [x; e] + b), of all heads in one batched product.

    All weights start at 0, so fresh heads copy the base model. Only a conditioned layer reads e, the embedding of the
    next root.

    Args:
        num_heads: K.
        hidden_size: H.
        conditioned: True if the layer reads e.

    Attributes:
        weight: [K, H, H], from input to output; [K, 2H, H] if conditioned, with the rows of e behind those of x.
        bias: [K, 1, H].
    """

    def __init__(self, num_heads: int, hidden_size: int, *, conditioned: bool = False) -> None:
        super().__init__()
        rows = 2 * hidden_size if conditioned else hidden_size
        self.weight = nn.Parameter(torch.zeros(num_heads, rows, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, hidden_size))

    @property
    def conditioned(self) -> bool:
        """True if the layer reads e."""
        return self.weight.shape[1] > self.weight.shape[2]

    def forward(self, states: Tensor, embedded: Tensor | None) -> Tensor:
        """Maps states [N, H] or [K, N, H] to [K, N, H]; ``embedded`` is [N, H]."""
        given = states
        if self.conditioned:
            assert embedded is not None
            given = torch.cat([states, embedded], dim=-1)
        return states + nn.functional.silu(torch.matmul(given, self.weight) + self.bias)


class MedusaHeads(DraftHeads):
    """K MEDUSA heads over one hidden state.

    Args:
        config: The shape of the heads.
        lm_head: The base model's output projection.
    """

    architecture = "medusa"
    config: MedusaConfig

    def __init__(self, config: MedusaConfig, lm_head: nn.Linear) -> None:
        super().__init__(config, lm_head)
        self.layers = nn.ModuleList(
            ResidualLayer(config.num_heads, config.hidden_size, conditioned=config.conditioned and layer == 0)
            for layer in range(config.num_layers)
        )
        self.projections: nn.ModuleList | None = None
        if not config.shared_lm_head:
            self.projections = nn.ModuleList(
                nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
                for _ in range(1 if config.one_projection else config.num_heads)
            )

    @classmethod
    def fresh(
        cls,
        num_heads: int,
        lm_head: nn.Linear,
        *,
        num_layers: int = 1,
        conditioned: bool = False,
        token_map: Tensor | None = None,
        own_projections: bool = False,
    ) -> MedusaHeads:
        """Makes untrained heads as the paper starts them: W1 is 0, and W2 is the base model's ``lm_head``.

        Args:
            num_heads: K.
            lm_head: The base model's output projection.
            num_layers: The number of residual blocks per head.
            conditioned: True if the heads read the embedding of the next root.
            token_map: [V'], the tokens that the heads can propose; all tokens if None.
            own_projections: Give each head a copy of W2, to be trained.
        """
        vocab_size, hidden_size = lm_head.weight.shape
        shared = token_map is None and not own_projections
        config = MedusaConfig(
            num_heads,
            hidden_size,
            vocab_size if token_map is None else len(token_map),
            num_layers=num_layers,
            shared_lm_head=shared,
            reduced_vocab=token_map is not None,
            one_projection=not shared and not own_projections,
            conditioned=conditioned,
        )
        heads = cls(config, lm_head)
        rows = lm_head.weight.detach() if token_map is None else lm_head.weight.detach()[token_map]
        for projection in heads.projections or ():
            projection.weight = nn.Parameter(rows.clone())
        heads.token_map = token_map
        return heads.to(dtype=lm_head.weight.dtype)

    @property
    def shares_lm_head(self) -> bool:
        return self.config.shared_lm_head

    @property
    def variant(self) -> str:
        return self.config.variant

    @property
    def residual_layers(self) -> list[ResidualLayer]:
        """The residual blocks; each holds the weights of all heads."""
        return [layer for layer in self.layers if isinstance(layer, ResidualLayer)]

    @property
    def common_projection(self) -> nn.Linear | None:
        """The one projection of all heads; None if each head has its own."""
        if self.projections is None:
            return self.lm_head
        first = self.projections[0] if self.config.one_projection else None
        assert first is None or isinstance(first, nn.Linear)
        return first

    def set_trainable(self, *, projections: bool) -> None:
        super().set_trainable(projections=projections)
        if self.projections is not None:
            self.projections.requires_grad_(projections)

    def forward(self, hidden: Tensor, embedded: Tensor | None = None, active: Size | None = None) -> Tensor:
        active = self.config.num_heads if active is None else active
        # With no active head all of this runs over no rows, so no weight is read.
        some = sym_min(active, 1)
        first = torch.arange(some, device=hidden.device)  # indices: TensorRT's parser makes 25 layers of such a slice
        states = hidden[:, None].index_select(1, first).flatten(0, 1)
        if self.config.conditioned:
            assert embedded is not None
            embedded = embedded[:, None].index_select(1, first).flatten(0, 1)
        for layer in self.residual_layers:
            states = layer(states, embedded)
        states = states.transpose(0, 1).reshape(hidden.shape[0], self.config.num_heads * some, hidden.shape[1])
        states = states.contiguous()  # otherwise torch copies the projection for each row
        if (common := self.common_projection) is not None:
            states = states.index_select(1, torch.arange(active, device=hidden.device))
            logits: Tensor = common(states.to(common.weight.dtype))
            return logits
        # A head beyond `active` runs over no rows, so its large matrix isn't read.
        assert self.projections is not None
        rows = [sym_max(sym_min(active - k, 1), 0) for k in range(self.config.num_heads)]
        return torch.cat(
            [project(states[:, k : k + n]) for k, (project, n) in enumerate(zip(self.projections, rows, strict=True))],
            dim=1,
        )

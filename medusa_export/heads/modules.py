"""MEDUSA heads: from the last hidden state, guess the tokens that follow the next one.

Head k (k = 1..K) predicts the token k + 1 places ahead: softmax(W2 (SiLU(W1 h + b1) + h))
(arXiv 2401.10774, section 2.1.1). *Conditioned* heads are also given the embedding e of the next token, which the
base model has chosen by the time they draft: SiLU(W1 h + U e + b1) in their first block.
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
        one_projection: One projection, that is not the ``lm_head`` itself, serves all heads.
        conditioned: The heads are given the embedding of the token that the base model has chosen.
    """

    num_heads: int
    num_layers: int
    hidden_size: int
    draft_vocab_size: int
    shared_lm_head: bool = False
    reduced_vocab: bool = False
    one_projection: bool = False
    conditioned: bool = False

    @property
    def variant(self) -> str:
        """The kind of head in words."""
        kinds = {self.shared_lm_head: "shared lm_head", self.one_projection: "one projection"}
        words = [kinds.get(True, "own projection per head")]
        if self.reduced_vocab:
            words.append(f"vocabulary of {self.draft_vocab_size:,}")
        if self.conditioned:
            words.append("conditioned on the next token")
        return ", ".join(words)


class ResidualLayer(nn.Module):
    """A residual block of every head, x + SiLU(W [x; e] + b), as one batched product.

    All start at 0, so that a fresh head copies the base model; e, the next token's embedding, only if conditioned.

    Attributes:
        weight: [K, H, H], from input to output; [K, 2H, H] if conditioned, the rows of e behind those of x.
        bias: [K, 1, H].
    """

    def __init__(self, num_heads: int, hidden_size: int, *, conditioned: bool = False) -> None:
        super().__init__()
        rows = 2 * hidden_size if conditioned else hidden_size
        self.weight = nn.Parameter(torch.zeros(num_heads, rows, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, hidden_size))

    @property
    def conditioned(self) -> bool:
        """Whether it takes in e."""
        return self.weight.shape[1] > self.weight.shape[2]

    def forward(self, states: Tensor, embedded: Tensor | None) -> Tensor:
        """[N, H] or [K, N, H] to [K, N, H]; ``embedded`` is [N, H]. A head's rows are one product, however many."""
        given = states
        if self.conditioned:
            assert embedded is not None
            given = torch.cat([states, embedded], dim=-1)
        return states + nn.functional.silu(torch.matmul(given, self.weight) + self.bias)

    def first(self, num_heads: int) -> ResidualLayer:
        """The blocks of the first heads, on the same memory."""
        with torch.device("meta"):  # replaced below
            kept = ResidualLayer(num_heads, self.weight.shape[-1], conditioned=self.conditioned)
        for name, parameter in self.named_parameters():
            setattr(kept, name, nn.Parameter(parameter.detach()[:num_heads], parameter.requires_grad))
        return kept


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
        self.layers = nn.ModuleList(
            ResidualLayer(config.num_heads, config.hidden_size, conditioned=config.conditioned and layer == 0)
            for layer in range(config.num_layers)
        )
        self.projections: nn.ModuleList | None = None
        if config.shared_lm_head:
            if lm_head is None:
                raise ValueError("Heads with a shared lm_head need the base model's lm_head.")
            # In a tuple, so that the base model's weight is not registered here a second time.
            self._shared = (lm_head,)
        else:
            self.projections = nn.ModuleList(
                nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
                for _ in range(1 if config.one_projection else config.num_heads)
            )
        self.register_buffer(
            "token_map", torch.arange(config.draft_vocab_size) if config.reduced_vocab else None, persistent=True
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
        """Untrained heads as the paper starts them: W1 = 0, and W2 the base model's ``lm_head``.

        Args:
            num_heads: K.
            lm_head: The base model's output projection.
            num_layers: Residual blocks per head.
            conditioned: Give them the embedding of the next token.
            token_map: The tokens that they can propose, [draft_vocab_size]; all if None.
            own_projections: A copy of W2 for each head, to be trained.
        """
        vocab_size, hidden_size = lm_head.weight.shape
        shared = token_map is None and not own_projections
        draft_vocab_size = vocab_size if token_map is None else len(token_map)
        config = HeadsConfig(
            num_heads,
            num_layers,
            hidden_size,
            draft_vocab_size,
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

    def truncated(self, num_heads: int) -> MedusaHeads:
        """The first ``num_heads`` heads, for a tree that is no deeper, on the same memory.

        Raises:
            ValueError: There are not that many.
        """
        if not 1 <= num_heads <= self.config.num_heads:
            raise ValueError(f"{num_heads} of {self.config.num_heads} heads can't be kept: choose 1 to that number.")
        with torch.device("meta"):  # replaced below
            kept = MedusaHeads(replace(self.config, num_heads=num_heads), getattr(self, "_shared", (None,))[0])
        kept.layers = nn.ModuleList(layer.first(num_heads) for layer in self.residual_layers)
        kept.projections = None if self.projections is None else self.projections[:num_heads]  # perhaps but one
        kept.token_map = self.token_map
        return kept.train(self.training)

    @property
    def residual_layers(self) -> list[ResidualLayer]:
        """The residual blocks, those of all heads together."""
        return [layer for layer in self.layers if isinstance(layer, ResidualLayer)]

    @property
    def common_projection(self) -> nn.Linear | None:
        """The one projection of all heads; None if each has its own."""
        if self.projections is None:
            return self._shared[0]
        first = self.projections[0] if self.config.one_projection else None
        assert first is None or isinstance(first, nn.Linear)
        return first

    def forward(self, hidden: Tensor, embedded: Tensor | None = None, active: Size | None = None) -> Tensor:
        """Draft logits of the first ``active`` heads.

        Args:
            hidden: [B, H], the base model's last hidden state at the token to draft from.
            embedded: [B, H], its embedding of the token chosen there; used by conditioned heads.
            active: How many heads to run; all of them if None.

        Returns:
            [B, active, draft_vocab_size].
        """
        active = self.config.num_heads if active is None else active
        # With no head active all of this runs over no rows: no weight is read.
        some = sym_min(active, 1)
        first = torch.arange(some, device=hidden.device)  # indices: TensorRT's parser makes 25 layers of such a slice
        states = hidden[:, None].index_select(1, first).flatten(0, 1)
        if self.config.conditioned:
            assert embedded is not None
            embedded = embedded[:, None].index_select(1, first).flatten(0, 1)
        for layer in self.residual_layers:
            states = layer(states, embedded)
        states = states.transpose(0, 1).reshape(hidden.shape[0], self.config.num_heads * some, hidden.shape[1])
        states = states.contiguous()  # or else torch copies the projection for each row
        if (common := self.common_projection) is not None:
            states = states.index_select(1, torch.arange(active, device=hidden.device))
            logits: Tensor = common(states.to(common.weight.dtype))
            return logits
        # Likewise the large matrix of each head beyond `active`.
        assert self.projections is not None
        rows = [sym_max(sym_min(active - k, 1), 0) for k in range(self.config.num_heads)]
        return torch.cat(
            [project(states[:, k : k + n]) for k, (project, n) in enumerate(zip(self.projections, rows, strict=True))],
            dim=1,
        )

"""The interface of a head architecture: configuration, drafts and weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from medusa_export.heads.sizes import Size


@dataclass(frozen=True)
class HeadsConfig:
    """The shape of a set of heads, of any architecture.

    Attributes:
        num_heads: K, the number of heads.
        hidden_size: H, the size of the base model's hidden states.
        draft_vocab_size: V', the number of tokens that a head can propose.
        conditioned: The heads read the embedding of the next root, the token that the base model chose last.
        reduced_vocab: The heads propose some of the tokens only; ``token_map`` says which.

    Raises:
        ValueError: A size is below 1.
    """

    num_heads: int
    hidden_size: int
    draft_vocab_size: int
    conditioned: bool = field(default=False, kw_only=True)
    reduced_vocab: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("num_heads", "hidden_size", "draft_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")


@dataclass(frozen=True)
class DraftInputs:
    """The input of heads: the state of each row after the accepted path.

    Attributes:
        hidden: [B, H], the base model's last hidden state at the deepest accepted node.
        next_root: [B, 1], the token that the base model chose there. It is the root of the next tree.
        embed: Gives the base model's embeddings [..., H] of tokens [...]; only heads that need them call it.
    """

    hidden: Tensor
    next_root: Tensor
    embed: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DraftTree:
    """The tree that heads fill with tokens. T is its number of nodes.

    Attributes:
        num_heads: K, the number of heads that the tree uses.
        top_k: The number of candidates per head that the tree uses.
        candidates: [T - 1], the place of each drafted node among the candidates, laid out [K, top_k].
        depths: [T], the depth of each node; heads that see the tokens drafted above a node need it.
        parents: [T], the index of each node's parent, which comes before the node.
    """

    num_heads: int
    top_k: int
    candidates: Tensor
    depths: Tensor
    parents: Tensor


@dataclass(frozen=True)
class Draft:
    """The draft of a step.

    Attributes:
        tokens: [B, T - 1], the token of each node below the root.
        logits: [B, active heads, V'], the logits that the tokens were taken from.
    """

    tokens: Tensor
    logits: Tensor


class DraftHeads(nn.Module, ABC):
    """Heads of one architecture over one base model.

    A subclass implements ``forward``. That is enough where each head proposes its candidates by itself, from the
    hidden state. Heads that also see the tokens drafted above a node override ``draft``.

    Args:
        config: The shape of the heads.
        lm_head: The base model's output projection, for heads that share it.

    Attributes:
        architecture: The name in the registry.
        config: The shape of the heads.
        token_map: [V'], the base model's token of each draft token; None if the heads propose all tokens.
    """

    architecture: ClassVar[str]
    token_map: Tensor | None

    def __init__(self, config: HeadsConfig, lm_head: nn.Linear) -> None:
        super().__init__()
        self.config = config
        self._base_lm_head = (lm_head,)  # in a tuple, so that its weight is not registered here too
        self.register_buffer("token_map", torch.arange(config.draft_vocab_size) if config.reduced_vocab else None)

    @abstractmethod
    def forward(self, hidden: Tensor, embedded: Tensor | None = None, active: Size | None = None) -> Tensor:
        """Computes the draft logits of the first ``active`` heads, [B, active, V'].

        Args:
            hidden: [B, H], the base model's last hidden state at the token to draft from.
            embedded: [B, H], the base model's embedding of the token that it chose there; None unless the heads are
                conditioned.
            active: The number of heads to run; all if None. It may be 0.
        """

    def draft(self, given: DraftInputs, tree: DraftTree, active: Size) -> Draft:
        """Fills a tree with the best candidates of each head.

        Args:
            given: The state to draft from.
            tree: The tree to fill.
            active: The number of heads to run. Nodes of the other heads get token 0: the host doesn't read them.
        """
        embedded = given.embed(given.next_root).squeeze(1) if self.config.conditioned else None
        logits = self(given.hidden, embedded, active)
        candidates = logits.topk(tree.top_k, dim=-1).indices
        if self.token_map is not None:
            candidates = self.token_map[candidates]
        flat = candidates.flatten(1)
        unused = flat.new_zeros(1).expand(flat.shape[0], tree.num_heads * tree.top_k)
        return Draft(torch.cat([flat, unused], dim=1).index_select(1, tree.candidates), logits)

    @property
    def lm_head(self) -> nn.Linear:
        """The base model's output projection."""
        return self._base_lm_head[0]

    @property
    def shares_lm_head(self) -> bool:
        """True if ``forward`` uses the base model's output projection, which must then stay as it is."""
        return False

    @property
    def variant(self) -> str:
        """The architecture and its options, in words for a person."""
        return self.architecture

    def truncated(self, num_heads: int) -> Self:
        """The first heads alone, for a tree that is no deeper. Their weights share the memory of these.

        It fits every architecture whose weights have one entry per head in their first dimension, or one tensor per
        head.

        Args:
            num_heads: The number of heads to keep.

        Raises:
            ValueError: There are fewer heads.
        """
        if not 1 <= num_heads <= self.config.num_heads:
            raise ValueError(f"{num_heads} of {self.config.num_heads} heads can't be kept: choose 1 to that number.")
        with torch.device("meta"):  # its weights are replaced below
            kept = type(self)(replace(self.config, num_heads=num_heads), self.lm_head)
        weights = self.state_dict(keep_vars=True)
        kept.load_state_dict(
            {name: weights[name].detach()[: len(wanted)] for name, wanted in kept.state_dict().items()}, assign=True
        )
        for name, parameter in kept.named_parameters():
            parameter.requires_grad_(weights[name].requires_grad)
        return kept.train(self.training)

    def set_trainable(self, *, projections: bool) -> None:
        """Sets which weights are trained.

        Args:
            projections: Also train large output projections that are copies of the base model's.
        """
        self.requires_grad_(True)

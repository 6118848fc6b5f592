"""Facts about a bundle, as its description holds them: end tokens, heads, acceptance, graphs and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from medusa_runtime.bundles.json_file import Name, Share
from medusa_runtime.bundles.model_facts import TokenId

StorageType = Literal["int8", "int4", "fp8", "fp32", "fp16", "bf16"]

Reason = Annotated[str, Meta(min_length=1, max_length=4096)]
Panel = Annotated[int, Meta(ge=1, le=2**16)]
NumHeads = Annotated[int, Meta(ge=0, le=64)]


@dataclass(frozen=True)
class EndToken:
    """A token that ends an answer.

    Attributes:
        id: The token's id.
        text: The token's name in the tokenizer; None without a tokenizer.
        sources: The parts of the model that name it: ``generation config``, ``config``, ``tokenizer`` or
            ``chat template``.
    """

    id: TokenId
    text: Name | None
    sources: tuple[Name, ...]

    def __str__(self) -> str:
        return f"{self.text} ({self.id})" if self.text is not None else f"token {self.id}"


@dataclass(frozen=True)
class HeadFacts:
    """Number and kind of the heads.

    Attributes:
        num_heads: K, without the heads that are deeper than the tree.
        variant: The kind of head, in words.
        trained: False for heads that ``--init-heads`` made.
    """

    num_heads: NumHeads
    variant: Name
    trained: bool


class Acceptance(msgspec.Struct, frozen=True):
    """Acceptance estimates: the probability that each node of the tree is accepted.

    Attributes:
        source: ``calibrated`` (measured for these heads), ``prior`` (typical of MEDUSA heads) or ``untrained``.
        node_values: The probability of each node, [T]; 1 for the root. If ``hit_values`` is given, these hold for
            steps without a lookup hit; otherwise for all steps.
        hit_values: The same for steps with a lookup hit, [T]; empty if both kinds of steps share ``node_values``.
        hit_share: Share of the steps that have a lookup hit.
    """

    source: Name
    node_values: tuple[Share, ...]
    hit_values: tuple[Share, ...] = msgspec.field(default=(), name="guessed_values")
    hit_share: Share = msgspec.field(default=0.0, name="guess_share")

    def values(self, *, hit: bool) -> tuple[float, ...]:
        """The probability of each node, [T], in steps with or without a lookup hit."""
        return self.hit_values if hit and self.hit_values else self.node_values

    @property
    def drafts_are_useless(self) -> bool:
        """True if no draft is expected to be accepted: the heads are untrained, or the tree has one node."""
        return self.expected_tokens(len(self.node_values)) <= 1.0

    def expected_tokens(self, size: int) -> float:
        """Expected tokens per step with the first ``size`` nodes [2.3.3], over steps with and without a lookup hit."""
        with_hit, without = (sum(self.values(hit=hit)[:size]) for hit in (True, False))
        return self.hit_share * with_hit + (1 - self.hit_share) * without


@dataclass(frozen=True)
class GraphFacts:
    """Facts about a graph of a bundle.

    Attributes:
        rewrites: Number of places that each rewrite changed, by the rewrite's name, in the order in which they ran.
        left_out: Why the bundle does not have the graph; None if it has.
        panel: Slots that attention sums together, in a graph whose attention gives a row the same bits for any tree
            size (see ``SlotLayout.size_within_panel``); None in other graphs, and in older bundles.
        rows_differ: True if rows of a graph with panels still differ between tree sizes: products of experts do.
    """

    rewrites: Mapping[Name, Annotated[int, Meta(ge=0)]] = field(default_factory=dict)
    left_out: Reason | None = None
    panel: Panel | None = None
    rows_differ: bool = False


@dataclass(frozen=True)
class WeightFacts:
    """Storage types of a bundle's weights. None is its dtype; ``int8`` and ``int4`` are blocks of integers.

    ``fp8`` are 8-bit floating-point numbers (e4m3) with a scale per row. ``fp16`` and ``bf16`` are cast to the bundle's
    dtype before they are used.

    Attributes:
        layers: The matrices of the decoder layers.
        lm_head: The output projection.
        heads: The projections of the heads.
        embeddings: The input embeddings.
        block_size: Columns of a matrix that share a scale; fewer where it does not divide them.
        symmetric: Blocks have no zero points.
        activations: The inputs of products with matrices of int8 are rounded to ``int8`` too, in ranges that are known
            beforehand, except those that would lose too much.
    """

    layers: StorageType | None = None
    lm_head: StorageType | None = None
    heads: StorageType | None = None
    embeddings: StorageType | None = None
    block_size: Annotated[int, Meta(ge=1)] = 32
    symmetric: bool = True
    activations: Literal["int8"] | None = None

    @property
    def has_integers(self) -> bool:
        """True if any matrix is stored as integers."""
        return any(kind in ("int8", "int4") for kind in self._kinds)

    @property
    def is_quantized(self) -> bool:
        """True if any matrix is stored in another type than the bundle's dtype."""
        return any(self._kinds)

    @property
    def _kinds(self) -> tuple[StorageType | None, ...]:
        return self.layers, self.lm_head, self.heads, self.embeddings

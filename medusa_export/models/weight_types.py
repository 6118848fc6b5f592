"""How the weights of a bundle are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from medusa_export.models.blocks import Bits

WeightType = Literal["int8", "int4"]
WEIGHT_TYPES: tuple[WeightType, ...] = get_args(WeightType)

Role = Literal["layers", "lm_head", "heads", "embeddings", "other"]

_BITS: dict[WeightType, Bits] = {"int8": 8, "int4": 4}
# Smaller blocks cost more for their scales than they gain.
_LEAST_BLOCK = 16


@dataclass(frozen=True)
class WeightTypes:
    """How the weights of a bundle are stored: None is the dtype that it computes in.

    Attributes:
        layers: The linear layers of the decoder layers.
        lm_head: The output projection.
        heads: The projections of the heads.
        embeddings: The input embeddings.
        block_size: Columns that share a scale, a power of two. A matrix whose columns it doesn't divide gets the
            largest smaller power of two that does.
        symmetric: Have no zero points.
    """

    layers: WeightType | None = None
    lm_head: WeightType | None = None
    heads: WeightType | None = None
    embeddings: WeightType | None = None
    block_size: int = 32
    symmetric: bool = True

    @classmethod
    def all(cls, weights: WeightType | None, *, block_size: int = 32, symmetric: bool = True) -> WeightTypes:
        """One type for all matrices, but no less than 8 bits for embeddings, of which a step reads a few rows."""
        embeddings: WeightType | None = None if weights is None else "int8"
        return cls(weights, weights, weights, embeddings, block_size, symmetric)

    @property
    def has_integers(self) -> bool:
        """True if any matrix is stored in integers."""
        return any((self.layers, self.lm_head, self.heads, self.embeddings))

    def bits(self, role: Role) -> Bits | None:
        """The bits per value of the weights of a role; None for the dtype that the bundle computes in."""
        chosen: WeightType | None = getattr(self, role, None)
        return None if chosen is None else _BITS[chosen]

    def block_for(self, columns: int) -> int | None:
        """The block size for a matrix; None if no size fits, so that it keeps its dtype."""
        size = self.block_size
        while columns % size:
            size //= 2
        return size if size >= _LEAST_BLOCK else None

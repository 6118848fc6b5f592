"""The storage types of a bundle's weights, as an export is asked for them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from medusa_export.common import defaults
from medusa_export.common.dtypes import WEIGHT_TYPES, WeightType
from medusa_export.common.errors import OptionError
from medusa_export.models.blocks import Bits
from medusa_runtime.bundles.bundle import WeightFacts

Role = Literal["layers", "lm_head", "heads", "embeddings", "other"]

_BITS: dict[WeightType, Bits] = {"int8": 8, "int4": 4}
# Smaller blocks cost more for their scales than they gain.
_LEAST_BLOCK = 16


@dataclass(frozen=True)
class WeightTypes(WeightFacts):
    """Storage types of a bundle's weights: None is the dtype that it computes in.

    Attributes:
        layers: The linear layers of the decoder layers.
        lm_head: The output projection.
        heads: The projections of the heads.
        embeddings: The input embeddings.
        block_size: Columns that share a scale, a power of two. A matrix whose columns it doesn't divide gets the
            largest smaller power of two that does.
        symmetric: Blocks that the export rounds have no zero points.
        keep_zero_points: Blocks of a file that have zero points or offsets are stored as they are. Otherwise they are
            rounded again to blocks without, which makes steps faster and is less exact.
    """

    block_size: int = defaults.BLOCK_SIZE
    keep_zero_points: bool = True

    def __post_init__(self) -> None:
        if self.block_size < _LEAST_BLOCK or self.block_size & (self.block_size - 1):
            raise OptionError(f"The block size is {self.block_size}: give a power of two from {_LEAST_BLOCK} on.")
        for role in ("layers", "lm_head", "heads", "embeddings"):
            chosen = getattr(self, role)
            if chosen is not None and chosen not in WEIGHT_TYPES:
                raise OptionError(f"There is no type {chosen!r} of weights: give one of {', '.join(WEIGHT_TYPES)}.")
        if self.embeddings in ("int4", "fp8"):
            raise OptionError(
                f"Embeddings can't be {self.embeddings}, since no operator looks up such rows: give int8."
            )

    @classmethod
    def all(
        cls,
        weights: WeightType | None,
        *,
        block_size: int = defaults.BLOCK_SIZE,
        symmetric: bool = True,
        keep_zero_points: bool = True,
    ) -> WeightTypes:
        """Returns one type for all matrices. With integers, embeddings are int8: a step reads a few rows of them."""
        embeddings: WeightType | None = None if weights in (None, "fp8") else "int8"
        return cls(weights, weights, weights, embeddings, block_size, symmetric, keep_zero_points=keep_zero_points)

    @property
    def facts(self) -> WeightFacts:
        """The part of these types that a bundle's description has."""
        return WeightFacts(**{field.name: getattr(self, field.name) for field in fields(WeightFacts)})

    def bits(self, role: Role) -> Bits | None:
        """The bits per integer of the weights of a role; None for weights that are no integers."""
        chosen: WeightType | None = getattr(self, role, None)
        return None if chosen is None else _BITS.get(chosen)

    def is_float8(self, role: Role) -> bool:
        """Whether the weights of a role are 8-bit floating-point numbers, with a scale per row."""
        return getattr(self, role, None) == "fp8"

    def block_for(self, columns: int) -> int | None:
        """The block size for a matrix; None if no size fits, so that it keeps its dtype."""
        size = self.block_size
        while columns % size:
            size //= 2
        return size if size >= _LEAST_BLOCK else None

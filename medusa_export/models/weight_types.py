"""The storage types of a bundle's weights, as a caller asks an export for them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from medusa_export.common import defaults
from medusa_export.common.dtypes import WEIGHT_TYPES, WeightType
from medusa_export.common.errors import OptionError
from medusa_export.models.blocks import Bits
from medusa_runtime.bundles.facts import WeightFacts

Role = Literal["layers", "lm_head", "heads", "embeddings", "other"]

HalfType = Literal["fp16", "bf16"]

_BITS: dict[WeightType, Bits] = {"int8": 8, "int4": 4}
_ROLES = ("layers", "lm_head", "heads", "embeddings")
_NAMES = {"layers": "layers", "lm_head": "output projection", "heads": "heads", "embeddings": "embeddings"}
_FLOATS = ("fp32", "fp16", "bf16")
# Smaller blocks cost more for their scales than they gain.
_LEAST_BLOCK = 16


@dataclass(frozen=True)
class WeightTypes(WeightFacts):
    """Storage types of a bundle's weights: None is the dtype that it computes in.

    ``int8`` and ``int4`` are blocks of integers, ``fp8`` has a scale per row. ``fp16`` and ``bf16`` are stored so, and
    cast to fp32 when the bundle is loaded.

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
        narrowed: Parts whose matrices are rounded to ``int4`` even if a file holds them in 8-bit blocks. In other parts
            such matrices stay in 8 bits.
    """

    block_size: int = defaults.BLOCK_SIZE
    keep_zero_points: bool = True
    narrowed: frozenset[Role] = frozenset()

    def __post_init__(self) -> None:
        if self.block_size < _LEAST_BLOCK or self.block_size & (self.block_size - 1):
            raise OptionError(f"The block size is {self.block_size}: give a power of two from {_LEAST_BLOCK} on.")
        for role in _ROLES:
            chosen = getattr(self, role)
            if chosen is not None and chosen not in WEIGHT_TYPES:
                raise OptionError(f"There is no type {chosen!r} of weights: give one of {', '.join(WEIGHT_TYPES)}.")
        if self.embeddings in ("int4", "fp8"):
            raise OptionError(
                f"Embeddings can't be {self.embeddings}, since no operator looks up such rows: give int8."
            )
        if self.activations is not None and "int8" not in (self.layers, self.lm_head):
            raise OptionError("Activations are rounded for products with int8 matrices only: give int8 weights.")

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
        embeddings: WeightType | None = "int8" if weights in ("int8", "int4") else None if weights == "fp8" else weights
        return cls(weights, weights, weights, embeddings, block_size, symmetric, keep_zero_points=keep_zero_points)

    @property
    def facts(self) -> WeightFacts:
        """The part of these types that a bundle's description has."""
        return WeightFacts(**{field.name: getattr(self, field.name) for field in fields(WeightFacts)})

    def bits(self, role: Role) -> Bits | None:
        """The bits per integer of the weights of a role; None for weights that are no integers."""
        chosen: WeightType | None = getattr(self, role, None)
        return None if chosen is None else _BITS.get(chosen)

    def half(self, role: Role) -> HalfType | None:
        """The 16-bit type of the weights of a role that are stored in fewer bits than the bundle computes in."""
        chosen: WeightType | None = getattr(self, role, None)
        return chosen if chosen in ("fp16", "bf16") else None

    def resolved(self, dtype: str) -> WeightTypes:
        """Returns the same types for a bundle that computes in some dtype. Its own dtype becomes None.

        Args:
            dtype: ``fp32``, ``fp16`` or ``bf16``.

        Raises:
            OptionError: Floating-point numbers of another type would gain nothing, or lose range; or activations are
                rounded, and the dtype is not fp32.
        """
        if self.activations is not None and dtype != "fp32":
            raise OptionError("Only inputs in fp32 are rounded to 8 bits: export in fp32, or leave activations out.")
        for role in _ROLES:
            kind = getattr(self, role)
            if kind in _FLOATS and dtype not in (kind, "fp32"):
                raise OptionError(
                    f"The {_NAMES[role]} can't be stored in {kind} where the bundle computes in {dtype}: give "
                    f"`dtype='fp32'`, or store them in {dtype}."
                )
        unchanged: dict[str, Any] = dict.fromkeys(role for role in _ROLES if getattr(self, role) == dtype)
        return replace(self, **unchanged)

    def is_float8(self, role: Role) -> bool:
        """True if the weights of a role are 8-bit floating-point numbers, with a scale per row."""
        return getattr(self, role, None) == "fp8"

    def block_for(self, columns: int) -> int | None:
        """The block size for a matrix; None if no size fits, so that it keeps its dtype."""
        size = self.block_size
        while columns % size:
            size //= 2
        return size if size >= _LEAST_BLOCK else None

"""Facts about the matrices of a bundle: how many there are of each storage type, by part of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

Part = Literal["layers", "lm_head", "heads", "embeddings"]
MatrixDtype = Literal["int4", "int8", "fp8", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class MatrixFacts:
    """Matrices of one part of the model that are stored in the same way.

    Attributes:
        part: The part of the model that uses them: ``layers`` are the decoder layers, ``heads`` the MEDUSA heads.
        dtype: The type of the stored values.
        count: The number of matrices. Merged projections count as one, and so does a stack of matrices.
        block_size: Columns that share a scale; None for matrices without blocks.
        has_zero_points: Blocks have zero points of their own.
        has_offsets: Blocks have offsets, as those of GGUF files with minima.
    """

    part: Part
    dtype: MatrixDtype
    count: Annotated[int, Meta(ge=1)] = 1
    block_size: Annotated[int, Meta(ge=1)] | None = None
    has_zero_points: bool = False
    has_offsets: bool = False

    def __str__(self) -> str:
        if self.block_size is None:
            return f"{self.count} {self.dtype}{'' if 'float' in self.dtype else ', a scale per row'}"
        own = [("zero points", self.has_zero_points), ("offsets", self.has_offsets)]
        parts = ["scales", *(name for name, present in own if present)]
        return f"{self.count} {self.dtype}, blocks of {self.block_size} with {' and '.join(parts)}"

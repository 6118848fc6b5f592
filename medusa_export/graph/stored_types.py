"""The storage types of the matrices of a step's graph, by part of the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import get_args

import onnx_ir as ir

from medusa_export.graph.weights import LazyWeight
from medusa_export.models.weight_types import Role
from medusa_runtime.bundles.matrices import MatrixDtype, MatrixFacts, Part

_FACTS = "medusa_export.matrix"
_PARTS: tuple[Part, ...] = get_args(Part)
_DTYPES: dict[ir.DataType, MatrixDtype] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


def note_type(
    values: ir.Value,
    role: Role,
    dtype: MatrixDtype,
    *,
    block_size: int | None = None,
    has_zero_points: bool = False,
    has_offsets: bool = False,
) -> None:
    """Notes at an initializer how it stores a matrix.

    Args:
        values: The initializer that holds the matrix's values.
        role: The part of the model that uses the matrix.
        dtype: The type of the values.
        block_size: Columns that share a scale; None for a matrix without blocks.
        has_zero_points: Blocks have zero points of their own.
        has_offsets: Blocks have offsets.
    """
    assert role != "other"
    values.meta[_FACTS] = MatrixFacts(
        role, dtype, block_size=block_size, has_zero_points=has_zero_points, has_offsets=has_offsets
    )


def stored_types(model: ir.Model) -> tuple[MatrixFacts, ...]:
    """Counts the matrices of a graph by part and storage type.

    Args:
        model: A graph whose weights are those of ``StepWeights``, after the rewrites that store them in other types.
    """
    counts: Counter[MatrixFacts] = Counter()
    for value in model.graph.initializers.values():
        facts = value.meta.get(_FACTS) or _unchanged(value)
        if facts is None:
            continue
        readers = {_reader(use.node, use.idx, facts) for use in value.uses()}
        counts.update(replace(facts, part=part) for part in readers)
    ordered = sorted(counts, key=lambda facts: (_PARTS.index(facts.part), -counts[facts]))
    return tuple(replace(facts, count=counts[facts]) for facts in ordered)


def _unchanged(value: ir.Value) -> MatrixFacts | None:
    """The facts about a matrix that keeps the dtype that the graph computes in; None for any other initializer."""
    weight = value.const_value
    if not isinstance(weight, LazyWeight) or weight.role == "other" or len(weight.shape) < 2:
        return None
    return MatrixFacts(weight.role, _DTYPES[weight.dtype])


def _reader(node: ir.Node, index: int, facts: MatrixFacts) -> Part:
    """The part of the model that a reader of a matrix belongs to. A tied matrix has readers in two parts."""
    return "embeddings" if node.op_type == "Gather" and index == 0 else facts.part

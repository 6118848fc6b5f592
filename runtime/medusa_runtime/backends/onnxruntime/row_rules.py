"""Finds out for which numbers of rows ONNX Runtime's products with integers give each row the same bits.

The order of their sums depends on the format of the weights, on the processor and on the version of ONNX Runtime. So
the kernels themselves are run, on small matrices, when a bundle is opened.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.onnxruntime.one_node import one_node_model
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.facts import WeightFacts
from medusa_runtime.bundles.matrices import MatrixFacts

# Sizes of the matrices that are tried: sums that are long enough, and as many rows as a kernel takes at once.
_COLUMNS, _OUTPUTS, _ROWS = 1024, 96, 8
_LEAST_BLOCK = 16
_PROVIDERS = ["CPUExecutionProvider"]
_BITS = {"int4": 4, "int8": 8}


class RowRule(enum.IntEnum):
    """The numbers of rows for which a product gives each row the same bits. A higher value is a stricter rule."""

    ANY = 0
    SEVERAL = 1  # two rows or more
    EVEN = 2
    NONE = 3  # rows depend on their neighbours

    def allows(self, rows: int) -> bool:
        """True if a product of this number of rows gives them the bits that the rule promises."""
        return self in (RowRule.ANY, RowRule.NONE) or (rows > 1 if self is RowRule.SEVERAL else rows % 2 == 0)


class _Format(NamedTuple):
    """A format of matrices of integers.

    Attributes:
        bits: Bits per value.
        block_size: Columns that share a scale.
        has_zero_points: Blocks have zero points of their own.
    """

    bits: int
    block_size: int
    has_zero_points: bool


def row_rule(ort: Any, bundle: Bundle) -> RowRule:
    """The rule for the derived graphs of a bundle, by the products whose results reach its tokens. Heads only draft.

    The rule is ``NONE`` for bundles with weights in integers whose rows depend on each other in any case: those that
    compute in fp16, those with a head_dim above 256, and mixtures of experts.

    Args:
        ort: The module ``onnxruntime``.
        bundle: The bundle.
    """
    weights = bundle.weights
    if weights.has_integers and not bundle.has_exact_rows:
        return RowRule.NONE
    formats = _formats(bundle.matrices) if bundle.matrices else _asked_formats(weights)
    return max((_rule(ort, format_) for format_ in formats), default=RowRule.ANY)


def _formats(matrices: Sequence[MatrixFacts]) -> set[_Format]:
    """The formats of the products with blocks of integers whose results reach the tokens."""
    return {
        _Format(_BITS[facts.dtype], facts.block_size, facts.has_zero_points)
        for facts in matrices
        if facts.part in ("layers", "lm_head") and facts.dtype in _BITS and facts.block_size is not None
    }


def _asked_formats(weights: WeightFacts) -> set[_Format]:
    """The formats that the products of an older bundle may have. Blocks may be smaller than the export asked for."""
    kinds = {_BITS[kind] for kind in (weights.layers, weights.lm_head) if kind in _BITS}
    sizes = [size for size in (16, 32, 64, 128, 256) if _LEAST_BLOCK <= size <= weights.block_size]
    return {_Format(bits, size, bits == 4 and not weights.symmetric) for bits in kinds for size in sizes}


@functools.cache
def _rule(ort: Any, format_: _Format) -> RowRule:
    """Runs one product with 1, 2, 3 and 8 rows, and compares the bits of each row."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(_product(format_), options, providers=_PROVIDERS)
    given = np.random.default_rng(0).standard_normal((_ROWS, _COLUMNS), np.float32)

    def results(rows: int) -> NDArray[np.float32]:
        parts = [session.run(None, {"x": given[start : start + rows]})[0] for start in range(0, _ROWS, rows)]
        return np.concatenate(parts)

    whole = results(_ROWS)
    same = {rows: np.array_equal(results(rows), whole) for rows in (1, 2, 3)}
    if not same[2]:
        return RowRule.NONE
    if not same[3]:
        return RowRule.EVEN
    return RowRule.ANY if same[1] else RowRule.SEVERAL


@functools.cache
def overflows(ort: Any) -> bool:
    """True if products of uint8 and int8 overflow between their sums, as on processors that have AVX2 and no VNNI."""
    largest = np.full((_COLUMNS, _OUTPUTS), 127, np.int8)
    columns, dtypes = (_COLUMNS, _OUTPUTS), (np.uint8, np.int32)
    model = one_node_model("MatMulInteger", "", {"values": largest}, {}, columns=columns, dtypes=dtypes)
    session = ort.InferenceSession(model, providers=_PROVIDERS)
    result = session.run(None, {"x": np.full((_ROWS, _COLUMNS), 255, np.uint8)})[0]
    return bool((result != 255 * 127 * _COLUMNS).any())


def _product(format_: _Format) -> bytes:
    """A model of one product with a random matrix."""
    bits, block_size, has_zero_points = format_
    numbers = np.random.default_rng(1)
    blocks = _COLUMNS // block_size
    constants: dict[str, NDArray[Any]] = {
        "values": numbers.integers(0, 256, (_OUTPUTS, blocks, block_size * bits // 8), np.uint8),
        "scales": numbers.uniform(0.01, 0.02, (_OUTPUTS, blocks)).astype(np.float32),
    }
    if has_zero_points:
        constants["zero_points"] = numbers.integers(0, 256, (_OUTPUTS, -(-blocks * bits // 8)), np.uint8)
    attributes = {"K": _COLUMNS, "N": _OUTPUTS, "bits": bits, "block_size": block_size, "accuracy_level": 4}
    return one_node_model("MatMulNBits", "com.microsoft", constants, attributes, columns=(_COLUMNS, _OUTPUTS))

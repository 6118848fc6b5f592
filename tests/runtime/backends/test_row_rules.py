"""The numbers of rows for which products with integers are exact, as the kernels of this processor are."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from medusa_runtime.backends.onnxruntime.row_rules import RowRule, _Format, _product, _rule

FORMATS = [_Format(4, 16, False), _Format(4, 32, True), _Format(4, 128, False), _Format(8, 32, False)]


@pytest.mark.parametrize("format_", FORMATS)
def test_rows_have_the_same_bits_in_the_numbers_that_the_rule_allows(format_: _Format) -> None:
    """With another input and other numbers of rows than those that the rule was found with."""
    rule = _rule(onnxruntime, format_)
    model = _product(format_)
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(7).standard_normal((64, 1024), np.float32)

    def bits(rows: int) -> NDArray[np.int32]:
        result: NDArray[np.float32] = session.run(None, {"x": x[:rows]})[0]
        return result.view(np.int32)

    expected = bits(64)
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 33):
        if rule is not RowRule.NONE and rule.allows(rows):
            assert np.array_equal(bits(rows), expected[:rows]), rows


@pytest.mark.parametrize(
    ("rule", "allowed"), [(RowRule.ANY, {1, 2, 3, 4}), (RowRule.SEVERAL, {2, 3, 4}), (RowRule.EVEN, {2, 4})]
)
def test_allowed_numbers(rule: RowRule, allowed: set[int]) -> None:
    assert {rows for rows in range(1, 5) if rule.allows(rows)} == allowed

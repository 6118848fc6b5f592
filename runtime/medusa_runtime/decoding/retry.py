"""Tries a step once more whose logits are not finite.

A draft that overflows makes the logits of its whole row NaN, although the row rejects it. So does a value that an
earlier request left in a slot: attention reads it with weight 0, and 0 · NaN is NaN. The graph then emits nothing for
the row and leaves its state as it was. Without these values, the same step gives what plain decoding gives.
"""

from __future__ import annotations

from collections.abc import Callable

from medusa_runtime.backends.base import Backend, StepResult
from medusa_runtime.errors import NotFiniteError


def retried(backend: Backend, row: int, dtype: str, again: Callable[[], StepResult]) -> StepResult:
    """The result of a step that emits for a row which emitted nothing in the step before.

    Args:
        backend: The backend; no step may be under way.
        row: The row.
        dtype: The type of the bundle's weights, for the message.
        again: Runs the step with the fewest tokens: the root alone, or a chunk without padding.

    Raises:
        NotFiniteError: It emits nothing again. The row is empty afterwards.
    """
    backend.scrub(row)
    result = again()
    if not result.count[row]:
        backend.reset(row)
        backend.scrub(row)  # the step has written its values behind the row's end
        remedy = "check its weights" if dtype == "float32" else "export it with --dtype fp32, or check its weights"
        raise NotFiniteError(
            f"The model's logits for this request are not finite numbers: a weight or an activation exceeds {dtype}. "
            f"{remedy.capitalize()}."
        )
    return result

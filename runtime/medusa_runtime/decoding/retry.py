"""Repeats a step whose logits were not finite.

A draft that overflows makes all logits of its row NaN, although the row rejects it. A value that an earlier request
left in a slot does the same: attention reads it with weight 0, and 0 · NaN is NaN. In both cases the graph emits
nothing for the row and leaves the row's state as it was. Without these values the same step gives what plain decoding
gives.
"""

from __future__ import annotations

from collections.abc import Callable

from medusa_runtime.backends.base import Backend, StepResult
from medusa_runtime.errors import NotFiniteError


def retried(backend: Backend, row: int, dtype: str, again: Callable[[], StepResult]) -> StepResult:
    """Cleans a row that emitted nothing in the last step, and repeats the step.

    Args:
        backend: The backend, with no step in flight.
        row: The row.
        dtype: The type of the bundle's weights, for the message.
        again: Runs the step with the fewest tokens: the root alone, or a chunk without padding.

    Returns:
        The result of that step.

    Raises:
        NotFiniteError: The row emits nothing again. The row is empty afterwards.
    """
    backend.scrub(row)
    result = again()
    if not result.count[row]:
        backend.reset(row)
        backend.scrub(row)  # the step has written its values behind the row's end
        remedy = "check its weights" if dtype == "float32" else "export it in fp32, or check its weights"
        raise NotFiniteError(
            f"The model's logits for this request are not finite numbers: a weight or an activation exceeds {dtype}. "
            f"{remedy.capitalize()}."
        )
    return result

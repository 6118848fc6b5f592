"""Checks that all weights of a step are finite in the dtype that they are exported in."""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_export.common.errors import CheckpointError, ExportError
from medusa_export.models.checkpoints import stored_weights
from medusa_export.step.step import MedusaStep


class WeightRange:
    """Refuses weights of a step that are not finite.

    A number beyond the range of a dtype becomes infinity when a checkpoint is read in that dtype. All answers would
    then be empty, or NaN.

    Args:
        step: The step to export.
        source: The checkpoint of the model: a folder, a hub id or a GGUF file. Messages give its value of the weight.
            None if there is no checkpoint.
    """

    def __init__(self, step: MedusaStep, source: str | None) -> None:
        self._step = step
        self._source = source

    def check(self, name: str, values: Tensor) -> None:
        """Refuses a weight that is not finite.

        Args:
            name: The weight's name in the step.
            values: Its values in the dtype of the export.

        Raises:
            ExportError: A value is not finite. The message names the weight, its value in the checkpoint if that can
                be found, and the remedy.
        """
        if not values.numel():
            return
        low, high = torch.aminmax(values)  # both are NaN if one value is
        if not (low.isfinite() and high.isfinite()):
            raise _refusal(self._step, self._source, name, values)


def _refusal(step: MedusaStep, source: str | None, name: str, weight: Tensor) -> ExportError:
    flat = int((~weight.isfinite()).flatten().int().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), weight.shape)]
    owner, _, own_name = name.partition(".")
    stored = _stored_value(step, source, own_name, weight, flat) if owner == "model" else None
    dtype, largest = str(weight.dtype).removeprefix("torch."), torch.finfo(weight.dtype).max
    subject = f"The weight {own_name} of the {'model' if owner == 'model' else 'heads'}"
    if stored is not None and torch.isfinite(torch.tensor(stored)):
        return ExportError(
            f"{subject} is {stored:g} at {index}, and the largest number of {dtype} is {largest:g}. Export it with "
            "`dtype='fp32'` or `dtype='bf16'`."
        )
    words = f"{subject} is {weight.flatten()[flat].item()} at {index}"
    if stored is not None or weight.dtype is torch.float32:
        return ExportError(f"{words} in its file, which no `dtype` repairs: get the file again, or train it again.")
    return ExportError(
        f"{words} in {dtype}, whose largest number is {largest:g}. Export it with `dtype='fp32'` or `dtype='bf16'`; "
        "if that is refused too, the file holds no number there."
    )


def _stored_value(step: MedusaStep, source: str | None, name: str, weight: Tensor, flat: int) -> float | None:
    """The value of one number of a weight in the checkpoint; None if the weight is stored in another form."""
    if source is None:
        return None
    try:
        for stored_name, own_name, values in stored_weights(source, step.model):
            if name in (stored_name, own_name) and values.shape == weight.shape:
                return float(values.flatten()[flat])
    except CheckpointError:
        return None
    return None

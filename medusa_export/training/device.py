"""The default device and type of a model."""

from __future__ import annotations

import torch

from medusa_export.common.dtypes import Dtype, torch_name


def device_of(asked: str | None) -> torch.device:
    """Returns the device that was asked for; the GPU, if there is one, if None."""
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(asked: Dtype | None, device: torch.device) -> str:
    """Returns PyTorch's name of a type; bfloat16 on a GPU and float32 elsewhere if None.

    Raises:
        OptionError: The type is unknown.
    """
    if asked is not None:
        return torch_name(asked)
    return "bfloat16" if device.type == "cuda" else "float32"

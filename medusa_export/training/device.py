"""The default device and type of a model."""

from __future__ import annotations

import torch

from medusa_export.common.dtypes import Dtype, torch_name


def device_of(asked: str | None) -> torch.device:
    """Returns the requested device. None means the GPU if there is one, otherwise the CPU."""
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(asked: Dtype | None, device: torch.device) -> str:
    """Returns PyTorch's name of the requested type. None means bfloat16 on a GPU and float32 elsewhere.

    Raises:
        OptionError: The type is unknown.
    """
    if asked is not None:
        return torch_name(asked)
    return "bfloat16" if device.type == "cuda" else "float32"

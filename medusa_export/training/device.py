"""Where a model runs, and in which type, unless the user says."""

from __future__ import annotations

import torch


def device_of(asked: str | None) -> torch.device:
    """The GPU, if there is one."""
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(asked: str | None, device: torch.device) -> str:
    """As ``torch`` calls it: bfloat16 on a GPU, float32 elsewhere."""
    return asked or ("bfloat16" if device.type == "cuda" else "float32")

"""The ONNX Runtime backend for GPUs with its state in host memory, which this machine has."""

from __future__ import annotations

import numpy as np

from medusa_runtime.backends.onnxruntime.cuda import OnnxRuntimeCudaBackend


class OnnxRuntimeOnHost(OnnxRuntimeCudaBackend):
    """The same code on ONNX Runtime's CPU provider."""

    provider, device = "CPUExecutionProvider", "cpu"

    def _copied(self, array: np.ndarray) -> object:  # on a CPU it would be the array itself
        return super()._copied(array.copy())

"""The ONNX Runtime backend for GPUs with its state in host memory, which this machine has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medusa_runtime.backends.onnxruntime.binding import Binding, Bound
from medusa_runtime.backends.onnxruntime.cuda import OnnxRuntimeCudaBackend


class CopyingBinding(Binding):
    """Copies host inputs when they are bound, as a provider with memory of its own does."""

    def _bind_array(self, name: str, array: np.ndarray) -> None:
        super()._bind_array(name, array.copy())
        self._arrays[name] = array, self._arrays[name][1]


class OnnxRuntimeOnHost(OnnxRuntimeCudaBackend):
    """The same code on ONNX Runtime's CPU provider."""

    provider, device = "CPUExecutionProvider", "cpu"

    def _new_binding(self, bound: Sequence[Bound]) -> Binding:
        return CopyingBinding(self._ort, self._session, bound)

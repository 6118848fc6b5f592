"""The ONNX Runtime backend for GPUs on the CPU, for machines without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medusa_runtime.backends.onnxruntime.binding import Binding, Bound
from medusa_runtime.backends.onnxruntime.cuda import OnnxRuntimeCudaBackend


class CopyingBinding(Binding):
    """Copies host inputs when they are bound, as a provider with its own memory does."""

    def _bind_array(self, name: str, array: np.ndarray) -> None:
        super()._bind_array(name, array.copy())
        self._arrays[name] = array, self._arrays[name][1]


class OnnxRuntimeOnHost(OnnxRuntimeCudaBackend):
    """The GPU backend's code on ONNX Runtime's CPU provider, with its state in host memory."""

    provider, device = "CPUExecutionProvider", "cpu"

    def _new_binding(self, bound: Sequence[Bound]) -> Binding:
        return CopyingBinding(self._ort, self._session, bound)

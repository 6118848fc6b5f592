"""The ONNX Runtime backend on an NVIDIA GPU: caches, pending entries and lengths stay in its memory.

It runs the bundle's standard graph, whose accepted entries are carried by the graph itself. Token ids, the drafted
tree among them, are some hundred bytes a step and go through the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.onnxruntime import OnnxRuntimeBackend, import_onnxruntime
from medusa_runtime.bundle import Bundle
from medusa_runtime.contract import cache_name
from medusa_runtime.errors import BackendError


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    """Runs a bundle with ONNX Runtime on a GPU.

    Args:
        bundle: What to run.
        rows: Sequences held at a time.
        threads: Threads of what stays on the CPU; all that this process may use if None.

    Raises:
        BackendError: This ONNX Runtime has no CUDA provider, or it can't be started.

    Attributes:
        device: Where the state is, as ONNX Runtime calls it.
    """

    provider = "CUDAExecutionProvider"
    device = "cuda"

    def __init__(self, bundle: Bundle, *, rows: int = 1, threads: int | None = None) -> None:
        ort = import_onnxruntime()
        if self.provider not in ort.get_available_providers():
            raise BackendError(
                f"ONNX Runtime {ort.__version__} has no {self.provider}: install it with "
                "pip install 'medusa-export[gpu]', in the place of the package onnxruntime."
            )
        self._state: dict[str, Any] = {}
        super().__init__(bundle, rows=rows, threads=threads, graph=bundle.graph)

    def _bind_state(self, name: str, array: NDArray[Any], *, output: str) -> NDArray[Any]:
        value = self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        self._state[name] = value
        self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(output, value)
        self._outputs[output] = None
        return array

    @property
    def name(self) -> str:
        return f"onnxruntime {self._ort.__version__}, {self.device}"

    @property
    def lengths(self) -> NDArray[np.int64]:
        lengths: NDArray[np.int64] = self._state["cache_lengths"].numpy()
        return lengths

    def reserve(self, capacity: int) -> None:
        if capacity > self._capacity > 0:
            for index in range(len(self._caches)):  # what is kept is copied on the host
                self._caches[index] = self._state[cache_name("past", index)].numpy()
        super().reserve(capacity)

    def reset(self, row: int) -> None:
        lengths = self.lengths
        lengths[row] = 0
        self._state["cache_lengths"].update_inplace(lengths)

    def close(self) -> None:
        super().close()
        self._state.clear()

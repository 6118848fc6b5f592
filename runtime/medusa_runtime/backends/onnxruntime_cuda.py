"""The ONNX Runtime backend on an NVIDIA GPU: caches, pending entries and lengths stay in its memory.

It runs the bundle's standard graph, whose accepted entries are carried by the graph itself. Token ids, the drafted
tree among them, are some hundred bytes a step and go through the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.onnxruntime import Bound, OnnxRuntimeBackend, import_onnxruntime
from medusa_runtime.bundle import Bundle
from medusa_runtime.contract import cache_name
from medusa_runtime.errors import BackendError


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    """Runs a bundle with ONNX Runtime on a GPU, all rows in every step.

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
        self._on_device: dict[str, Any] = {}
        super().__init__(bundle, rows=rows, threads=threads, graph=bundle.graph)

    def _bind_state(self, name: str, array: NDArray[Any], *, output: str) -> NDArray[Any]:
        self._bound.append(self._kept(name, array, output))
        return array

    def _bound_cache(self, index: int, cache: NDArray[Any]) -> Bound:
        return self._kept(cache_name("past", index), cache, cache_name("present", index))

    def _kept(self, name: str, array: NDArray[Any], output: str) -> Bound:
        """A copy of an array on the device, which is what steps read and write from now on."""
        value = self._on_device[name] = self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        return Bound(name, array, output, value)

    @property
    def name(self) -> str:
        return f"onnxruntime {self._ort.__version__}, {self.device}"

    @property
    def lengths(self) -> NDArray[np.int64]:
        lengths: NDArray[np.int64] = self._on_device["cache_lengths"].numpy()
        return lengths

    def _resize(self, capacity: int) -> None:
        for index, cache in enumerate(self._caches):  # what is kept is copied on the host
            if (value := self._on_device.get(cache_name("past", index))) is not None:
                cache[:] = value.numpy()
        super()._resize(capacity)

    def reset(self, row: int) -> None:
        lengths = self.lengths
        lengths[row] = 0
        self._on_device["cache_lengths"].update_inplace(lengths)

    def close(self) -> None:
        super().close()
        self._on_device.clear()

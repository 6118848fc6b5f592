"""ONNX Runtime on an NVIDIA GPU: caches and pending entries stay in its memory.

The graph carries accepted entries over by itself, as the standard one does. Token ids, lengths and drafts are
some hundred bytes a step and go through the host.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence

from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.onnxruntime.binding import Binding
from medusa_runtime.backends.onnxruntime.device_caches import DeviceCaches
from medusa_runtime.backends.onnxruntime.session import CUDA, cuda_graph, import_onnxruntime
from medusa_runtime.backends.onnxruntime.session_backend import SessionBackend
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.errors import BackendError


class OnnxRuntimeCudaBackend(SessionBackend):
    """Runs a bundle with ONNX Runtime on a GPU; a step computes all rows.

    A row that doesn't take part in a step takes in a chunk of no tokens, which leaves its entries as they are.

    Args:
        bundle: The bundle.
        rows: Sequences held at a time.
        threads: Threads of the operators that stay on the CPU; all that this process may use if None.

    Raises:
        BackendError: The bundle has a type that this backend does not take, or ONNX Runtime has no CUDA provider, or
            can't start it.

    Attributes:
        provider: ONNX Runtime's name of the execution provider.
        device: ONNX Runtime's name of the device that holds the caches.
    """

    provider = CUDA
    device = "cuda"

    def __init__(self, bundle: Bundle, *, rows: int = 1, threads: int | None = None) -> None:
        ort = import_onnxruntime()
        if bundle.dtype == "bfloat16":
            raise BackendError(
                "This bundle is bfloat16: onnxruntime-cuda passes caches through NumPy, which has no such type, and "
                "it is not known whether ONNX Runtime's CUDA kernels would run the step. Export it in fp16 or fp32, "
                "or compile it with 'medusa-export trt'."
            )
        if bundle.kv_cache is not None:
            raise BackendError(
                f"This bundle has a K/V cache in {bundle.kv_cache}, which was never tried with onnxruntime-cuda. "
                "Export the bundle without --kv-cache."
            )
        if self.provider not in ort.get_available_providers():
            raise BackendError(
                f"ONNX Runtime {ort.__version__} has no {self.provider}: install it with "
                "pip install 'medusa-export[gpu]', in place of the package onnxruntime."
            )
        if hasattr(ort, "preload_dlls"):
            # ONNX Runtime loads CUDA and cuDNN from pip's packages, and prints the names of libraries that are missing.
            with contextlib.redirect_stdout(sys.stderr):
                ort.preload_dlls()
        super().__init__(bundle, cuda_graph(bundle), self.provider, rows=rows, threads=threads, pending=False)
        self._caches = DeviceCaches(ort, self.device, bundle, rows)
        self._binding: Binding | None = None

    @property
    def name(self) -> str:
        return f"onnxruntime {self._ort.__version__}, {self.device}"

    @property
    def capacity(self) -> int:
        return self._caches.capacity

    def reserve(self, capacity: int) -> None:
        if capacity > self._caches.capacity:
            self._caches.grow(capacity)
            self._binding = None

    def truncate(self, row: int, length: int) -> None:
        if length:
            self._caches.truncate(row, int(self.lengths[row]), length)
        self.lengths[row] = length

    def scrub(self, row: int) -> None:
        self._caches.scrub(row, int(self.lengths[row]))

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        order = list(range(self._rows))
        idle = [] if rows is None else [row for row in order if row not in rows]
        self._check_room(size)
        inputs = self._state.write_inputs(size, {**(prompts or {}), **dict.fromkeys(idle, ())}, order)
        if self._binding is None:
            self._binding = self._new_binding([*self._state.bound, *self._caches.bound])
        for name, array in inputs.items():
            self._binding.bind(name, array)
        self._binding.refresh()
        self._caches.bind_pending(self._binding)
        self._run(self._binding, order, size, self.capacity)
        self._state.commit([row for row in order if row not in idle] if idle else None)
        self._caches.commit_pending()
        return self._state.result

    def _check_room(self, size: int) -> None:
        """Raises ``BackendError`` unless every row has room, as a step writes to those that don't take part, too."""
        longest = int(self.lengths.max())
        needed = self._bundle.slots.capacity(longest, size)
        if needed > self.capacity:
            raise BackendError(
                f"A step of {size} tokens after {longest} takes {needed} slots, but the caches have {self.capacity}: "
                "reserve more, or empty the longest row."
            )

    def close(self) -> None:
        self._close_session()
        self._binding = None
        self._caches.close()

"""The ONNX Runtime backend on an NVIDIA GPU: caches, pending entries and lengths stay in its memory.

It runs the bundle's standard graph, whose accepted entries are carried by the graph itself. Token ids, the drafted
tree among them, are some hundred bytes a step and go through the host.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.onnxruntime.backend import (
    Binding,
    Bound,
    OnnxRuntimeBackend,
    import_onnxruntime,
    scrub_caches,
)
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.contract import cache_name
from medusa_runtime.errors import BackendError


@dataclass
class _Kept:
    """What a step reads and the next one's, which take turns in two blocks of device memory.

    Attributes:
        now: What the next step reads.
        following: Where it leaves what the one after it reads.
        output: That output's name.
    """

    now: Any
    following: Any
    output: str


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
    bfloat16_refusal = (
        "This bundle is bfloat16: onnxruntime-cuda passes caches through NumPy, which has no such type, and nobody has "
        "tried whether ONNX Runtime's CUDA kernels would run the step. Export it with --dtype fp16 or fp32, or compile "
        "it with 'medusa-export trt'."
    )

    def __init__(self, bundle: Bundle, *, rows: int = 1, threads: int | None = None) -> None:
        ort = import_onnxruntime()
        if self.provider not in ort.get_available_providers():
            raise BackendError(
                f"ONNX Runtime {ort.__version__} has no {self.provider}: install it with "
                "pip install 'medusa-export[gpu]', in the place of the package onnxruntime."
            )
        if hasattr(ort, "preload_dlls"):
            # CUDA and cuDNN where pip has put them; the system's are found anyway. It prints what it doesn't find.
            with contextlib.redirect_stdout(sys.stderr):
                ort.preload_dlls()
        self._on_device: dict[str, Any] = {}
        self._state: dict[str, _Kept] = {}
        super().__init__(bundle, rows=rows, threads=threads, graph=bundle.graph)

    def _bind_state(self, name: str | None, array: NDArray[Any], *, output: str) -> NDArray[Any]:
        if name is None:
            return super()._bind_state(None, array, output=output)
        self._state[name] = _Kept(self._copied(array), self._copied(array), output)
        return array

    def _before_run(self, binding: Binding) -> None:
        binding.refresh()
        for name, kept in self._state.items():
            binding.values.bind_ortvalue_input(name, kept.now)
            binding.values.bind_ortvalue_output(kept.output, kept.following)

    def _carry_over(self, rows: slice | list[int]) -> None:
        super()._carry_over(rows)
        for kept in self._state.values():
            kept.now, kept.following = kept.following, kept.now

    def _bound_cache(self, index: int, cache: NDArray[Any]) -> Bound:
        name = cache_name("past", index)
        value = self._on_device[name] = self._copied(cache)
        return Bound(name, cache, cache_name("present", index), value)

    def _copied(self, array: NDArray[Any]) -> Any:
        """A copy of an array on the device."""
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    @property
    def name(self) -> str:
        return f"onnxruntime {self._ort.__version__}, {self.device}"

    @property
    def lengths(self) -> NDArray[np.int64]:
        lengths: NDArray[np.int64] = self._state["cache_lengths"].now.numpy()
        return lengths

    def _resize(self, capacity: int) -> None:
        for index, cache in enumerate(self._caches):  # what is kept is copied on the host
            if (value := self._on_device.get(cache_name("past", index))) is not None:
                cache[:] = value.numpy()
        super()._resize(capacity)
        self._on_device.clear()  # until the next step the host's copy counts

    def reset(self, row: int) -> None:
        lengths = self.lengths
        lengths[row] = 0
        self._state["cache_lengths"].now.update_inplace(lengths)

    def truncate(self, row: int, length: int) -> None:
        # By way of the host, as ONNX Runtime copies no part of a value on a device.
        if length and "pending_kv" in self._state:
            for index, cache in enumerate(self._caches):
                if (value := self._on_device.get(cache_name("past", index))) is not None:
                    cache[row] = value.numpy()[row]
            kept = self._state["pending_kv"].now
            entries = kept.numpy()
            _, entries[row] = self._cut(self._caches[:, row], entries[row], row, length)
            kept.update_inplace(entries)
        lengths = self.lengths
        lengths[row] = length
        self._state["cache_lengths"].now.update_inplace(lengths)

    def scrub(self, row: int) -> None:
        # By way of the host, as ONNX Runtime sets no part of a value on a device; it is seldom needed.
        margin, length = self._bundle.tree.max_depth, int(self.lengths[row])
        for index, cache in enumerate(self._caches):
            value = self._on_device.get(cache_name("past", index))
            slots = cache if value is None else value.numpy()
            scrub_caches(slots[None, row], margin, length)
            if value is not None:
                value.update_inplace(slots)
        if "pending_kv" in self._state:
            kept = self._state["pending_kv"].now
            entries = kept.numpy()
            entries[row, :, : max(0, margin - length)] = 0
            kept.update_inplace(entries)

    def close(self) -> None:
        super().close()
        self._on_device.clear()
        self._state.clear()

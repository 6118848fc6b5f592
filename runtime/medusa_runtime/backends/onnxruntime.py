"""The ONNX Runtime backend: every buffer bound once, caches updated in place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import StepResult
from medusa_runtime.bundle import Bundle
from medusa_runtime.contract import cache_name
from medusa_runtime.errors import BackendError

# Caches grow in steps of this many slots, so that a longer request seldom moves them.
CAPACITY_STEP = 64


def import_onnxruntime() -> Any:
    """The ``onnxruntime`` module.

    Raises:
        BackendError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed. Install it with: pip install 'medusa-export[cpu]' (or [gpu])."
        ) from error
    return onnxruntime


class OnnxRuntimeBackend:
    """Runs a bundle with ONNX Runtime on the CPU.

    Args:
        bundle: What to run.
        rows: Sequences held at a time.
        threads: Threads of one step; all that this process may use if None.
        graph: The graph to run instead of the bundle's own, by path or as bytes.
    """

    def __init__(
        self, bundle: Bundle, *, rows: int = 1, threads: int | None = None, graph: str | bytes | None = None
    ) -> None:
        ort = import_onnxruntime()
        if bundle.dtype == "bfloat16":
            raise BackendError(
                "This bundle is bfloat16, which ONNX Runtime has no CPU kernels for. "
                "Export it with --dtype fp32 or fp16 to run it on a CPU."
            )
        self._ort = ort
        self._bundle = bundle
        self._rows = rows
        self._threads = threads or len(os.sched_getaffinity(0))
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(bundle.folder.resolve())
        )
        try:
            self._session = ort.InferenceSession(
                str(bundle.graph) if graph is None else graph, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions share no base of their own
            raise BackendError(f"ONNX Runtime {ort.__version__} can't load {bundle.graph}: {error}") from error
        self._dtype = np.dtype(bundle.dtype)
        self._binding = self._session.io_binding()
        self._caches: dict[str, Any] = {}
        self._capacity = 0

        depth = bundle.tree.max_depth
        self._num_tokens = self._bind("num_tokens", np.zeros(rows, np.int64))
        self._is_prefill = self._bind("is_prefill", np.zeros(rows, np.bool_))
        # A step reads these before it writes them, so each is its own successor.
        self._lengths = self._bind("cache_lengths", np.zeros(rows, np.int64), output="next_cache_lengths")
        if depth:
            shape = next(spec.shape for spec in bundle.inputs if spec.name == "pending_kv")
            self._bind("pending_kv", np.zeros((rows, *shape[1:]), self._dtype), output="next_pending_kv")
        self._tokens = self._bind(None, np.zeros((rows, depth + 1), np.int64), output="tokens")
        self._count = self._bind(None, np.zeros(rows, np.int64), output="count")
        self._draft = self._bind(None, np.zeros((rows, bundle.tree.size), np.int64), output="next_input_ids")
        self._result = StepResult(self._tokens, self._count)
        self._input_ids: dict[int, tuple[NDArray[np.int64], Any]] = {}

    def _bind(self, name: str | None, array: NDArray[Any], *, output: str | None = None) -> NDArray[Any]:
        """Binds an array's memory to an input and, or, an output."""
        value = self._ort.OrtValue.ortvalue_from_numpy(array)
        if name is not None:
            self._binding.bind_ortvalue_input(name, value)
        if output is not None:
            self._binding.bind_ortvalue_output(output, value)
        return array

    @property
    def name(self) -> str:
        return f"onnxruntime {self._ort.__version__}, CPU, {self._threads} threads"

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def capacity(self) -> int:
        return self._capacity

    def reserve(self, capacity: int) -> None:
        if capacity <= self._capacity:
            return
        capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        model = self._bundle.model
        shape = (self._rows, model.num_key_value_heads, capacity, model.head_dim)
        names = [cache_name("past", index) for index in range(2 * model.num_layers)]
        try:
            # Slots that no token has reached are attended with weight 0, so they must hold numbers.
            grown = {name: np.zeros(shape, self._dtype) for name in names}
        except MemoryError as error:
            size = len(names) * int(np.prod(shape)) * self._dtype.itemsize
            raise BackendError(f"There is no memory for caches of {capacity} tokens ({size / 2**20:.0f} MiB).") from error
        for index, name in enumerate(names):
            if name in self._caches:
                grown[name][:, :, : self._capacity] = self._caches[name]
            self._caches[name] = self._bind(name, grown[name], output=cache_name("present", index))
        self._capacity = capacity

    def reset(self, row: int) -> None:
        self._lengths[row] = 0

    def step(self, size: int, prompts: Mapping[int, Sequence[int]] | None = None) -> StepResult:
        self._bind_input_ids(size, prompts or {})
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed in a step of {size} tokens at capacity {self._capacity}: {error}"
            ) from error
        return self._result

    def _bind_input_ids(self, size: int, prompts: Mapping[int, Sequence[int]]) -> None:
        known = self._input_ids.get(size)
        if known is None:
            array = np.zeros((self._rows, size), np.int64)
            known = self._input_ids[size] = (array, self._ort.OrtValue.ortvalue_from_numpy(array))
        array, value = known
        for row in range(self._rows):
            prompt = prompts.get(row)
            if prompt is None:
                drafted = self._draft[row, :size]
                array[row, : len(drafted)] = drafted
            else:
                array[row, : len(prompt)] = prompt
                array[row, len(prompt) :] = 0
            self._is_prefill[row] = prompt is not None
            self._num_tokens[row] = size if prompt is None else len(prompt)
        self._binding.bind_ortvalue_input("input_ids", value)

    def close(self) -> None:
        self._caches.clear()
        self._input_ids.clear()
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()

"""The ONNX Runtime backend: every buffer bound once, caches updated in place.

It runs the graph that was derived for ONNX Runtime where a bundle has one, for a single row at least:
``GroupQueryAttention`` takes several tokens of one sequence or one token of several. That graph appends new entries
to the caches without carrying accepted ones over from step to step: it says which nodes it accepted, and
the few entries below the root are moved to their places here. Plain decoding moves none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import StepResult
from medusa_runtime.bundle import ONNXRUNTIME_GRAPH, Bundle
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

    Attributes:
        provider: The execution provider, as ONNX Runtime calls it.

    Args:
        bundle: What to run.
        rows: Sequences held at a time.
        threads: Threads of one step; all that this process may use if None.
        graph: The graph to run, by path or as bytes; if None the bundle's derived one, or else its own.
        extra_outputs: Outputs beyond the contract that a graph has, kept for ``extra_output``.
    """

    provider = "CPUExecutionProvider"

    def __init__(
        self,
        bundle: Bundle,
        *,
        rows: int = 1,
        threads: int | None = None,
        graph: Path | bytes | None = None,
        extra_outputs: Sequence[str] = (),
    ) -> None:
        ort = import_onnxruntime()
        if bundle.dtype == "bfloat16":
            raise BackendError(
                "This bundle is bfloat16, which ONNX Runtime has no CPU kernels for. "
                "Export it with --dtype fp32 or fp16 to run it on a CPU."
            )
        if graph is None:
            derived = rows == 1 and ONNXRUNTIME_GRAPH in bundle.files
            graph = bundle.folder / ONNXRUNTIME_GRAPH if derived else bundle.graph
        self._ort = ort
        self._bundle = bundle
        self._rows = rows
        self._threads = threads or len(os.sched_getaffinity(0))
        self._session = _open_session(ort, bundle, graph, self._threads, self.provider)
        self._dtype = np.dtype(bundle.dtype)
        self._binding = self._session.io_binding()
        self._outputs: dict[str, None] = {}  # names in the order in which they were bound
        self._capacity = 0

        # [2L, rows, N, C, d], the caches in the order of the contract.
        self._caches: NDArray[Any] = np.zeros((0,), self._dtype)
        depth = bundle.tree.max_depth
        self._num_tokens = self._bind("num_tokens", np.zeros(rows, np.int64))
        self._is_prefill = self._bind("is_prefill", np.zeros(rows, np.bool_))
        # A step reads these before it writes them, so each is its own successor.
        self._lengths = self._bind_state("cache_lengths", np.zeros(rows, np.int64), output="next_cache_lengths")
        if any(value.name == "pending_kv" for value in self._session.get_inputs()):
            shape = next(spec.shape for spec in bundle.inputs if spec.name == "pending_kv")
            pending = np.zeros((rows, *map(int, shape[1:])), self._dtype)
            self._bind_state("pending_kv", pending, output="next_pending_kv")
        self._path: NDArray[np.int64] | None = None
        if any(value.name == "accepted_path" for value in self._session.get_outputs()):
            self._path = self._bind(None, np.zeros((rows, depth + 1), np.int64), output="accepted_path")
        self._tokens = self._bind(None, np.zeros((rows, depth + 1), np.int64), output="tokens")
        self._count = self._bind(None, np.zeros(rows, np.int64), output="count")
        self._drafts = self._bind(None, np.zeros((rows, bundle.tree.size), np.int64), output="next_input_ids")
        self._result = StepResult(self._tokens, self._count)
        self._extra_outputs = tuple(extra_outputs)
        self._input_ids: dict[int, tuple[NDArray[np.int64], Any]] = {}

    def _bind(self, name: str | None, array: NDArray[Any], *, output: str | None = None) -> NDArray[Any]:
        """Binds an array's memory to an input and, or, an output."""
        value = self._ort.OrtValue.ortvalue_from_numpy(array)
        if name is not None:
            self._binding.bind_ortvalue_input(name, value)
        if output is not None:
            self._binding.bind_ortvalue_output(output, value)
            self._outputs[output] = None
        return array

    def _bind_state(self, name: str, array: NDArray[Any], *, output: str) -> NDArray[Any]:
        """Binds what one step leaves for the next, where the provider keeps it."""
        return self._bind(name, array, output=output)

    @property
    def name(self) -> str:
        return f"onnxruntime {self._ort.__version__}, CPU, {self._threads} threads"

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def max_tokens(self) -> int | None:
        return None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Committed entries per row, [rows]."""
        return self._lengths

    @property
    def drafts(self) -> NDArray[np.int64]:
        return self._drafts

    def extra_output(self, name: str) -> NDArray[Any]:
        """What the last step gave for one of ``extra_outputs``."""
        value: NDArray[Any] = self._binding.get_outputs()[list(self._outputs).index(name)].numpy()
        return value

    def reserve(self, capacity: int) -> None:
        if capacity <= self._capacity:
            return
        capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        model = self._bundle.model
        shape = (2 * model.num_layers, self._rows, model.num_key_value_heads, capacity, model.head_dim)
        try:
            # Slots that no token has reached are attended with weight 0, so they must hold numbers.
            grown = np.zeros(shape, self._dtype)
        except MemoryError as error:
            size = int(np.prod(shape)) * self._dtype.itemsize
            raise BackendError(
                f"There is no memory for caches of {capacity} tokens ({size / 2**20:.0f} MiB)."
            ) from error
        if self._capacity:
            grown[:, :, :, : self._capacity] = self._caches
        for index, cache in enumerate(grown):
            self._bind_state(cache_name("past", index), cache, output=cache_name("present", index))
        self._caches, self._capacity = grown, capacity

    def reset(self, row: int) -> None:
        self._lengths[row] = 0

    def step(self, size: int, prompts: Mapping[int, Sequence[int]] | None = None) -> StepResult:
        self._bind_input_ids(size, prompts or {})
        for name in self._extra_outputs:  # of another shape in each step
            self._binding.bind_output(name)
            self._outputs[name] = None
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed in a step of {size} tokens at capacity {self._capacity}: {error}"
            ) from error
        if self._path is not None:
            self._move_accepted(self._path)
        return self._result

    def _move_accepted(self, path: NDArray[np.int64]) -> None:
        """Moves the entries of accepted nodes together; that of the root, the first, is in its place."""
        for row in range(self._rows):
            count = int(self._count[row])
            if count == 1 or self._is_prefill[row]:
                continue
            nodes = path[row, 1:count]
            root = self._bundle.tree.max_depth + int(self._lengths[row]) - count
            cache = self._caches[:, row]
            cache[:, :, root + 1 : root + count] = cache[:, :, root + nodes]

    def _bind_input_ids(self, size: int, prompts: Mapping[int, Sequence[int]]) -> None:
        known = self._input_ids.get(size)
        if known is None:
            array = np.zeros((self._rows, size), np.int64)
            known = self._input_ids[size] = (array, self._ort.OrtValue.ortvalue_from_numpy(array))
        array, value = known
        for row in range(self._rows):
            prompt = prompts.get(row)
            if prompt is None:
                drafted = self._drafts[row, :size]
                array[row, : len(drafted)] = drafted
            else:
                array[row, : len(prompt)] = prompt
                array[row, len(prompt) :] = 0
            self._is_prefill[row] = prompt is not None
            self._num_tokens[row] = size if prompt is None else len(prompt)
        self._binding.bind_ortvalue_input("input_ids", value)

    def close(self) -> None:
        self._caches = np.zeros((0,), self._dtype)
        self._capacity = 0
        self._input_ids.clear()
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()


def _open_session(ort: Any, bundle: Bundle, graph: Path | bytes, threads: int, provider: str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.folder.resolve())
    )
    try:
        session = ort.InferenceSession(graph if isinstance(graph, bytes) else str(graph), options, providers=[provider])
    except Exception as error:  # its exceptions share no base of their own
        raise BackendError(f"ONNX Runtime {ort.__version__} can't load {bundle.graph}: {error}") from error
    if provider not in session.get_providers():  # it goes on without one that it can't start
        raise BackendError(
            f"ONNX Runtime {ort.__version__} could not start {provider}: check that the NVIDIA driver, CUDA and cuDNN "
            "are of the versions that it needs."
        )
    return session

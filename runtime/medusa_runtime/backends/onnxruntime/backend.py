"""The ONNX Runtime backend: every buffer bound once, caches updated in place.

What a step leaves for the next goes to memory of its own, and takes effect once the step has come to its end: one that
fails leaves rows as they were, as what it wrote into their caches lies behind their committed entries.

It runs the graph that was derived for ONNX Runtime where a bundle has one: there is one for a single row and one for
several, as ``GroupQueryAttention`` takes several tokens of one sequence or one token of several. Both append new
entries to the caches without carrying accepted ones over from step to step: they say which nodes they accepted, and
the few entries below the root are moved to their places here. Plain decoding moves none.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import StepResult
from medusa_runtime.bundles.bundle import ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_GRAPH, WEIGHTS, Bundle
from medusa_runtime.bundles.contract import cache_name, fixed_shape
from medusa_runtime.bundles.listed_folder import leads_outside, open_regular
from medusa_runtime.bundles.slots import rounded_capacity
from medusa_runtime.common.cpus import usable_cpus
from medusa_runtime.common.processes import keep_in_children
from medusa_runtime.errors import BackendError
from medusa_runtime.sampling import Draws, SamplingRows

DYNAMIC_BLOCKS = "8"  # per thread
_PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}  # fp32 is fp32, as everywhere else


def import_onnxruntime() -> Any:
    """The ``onnxruntime`` module.

    Its telemetry is off, unless ``ORT_DISABLE_TELEMETRY`` is set to 0 or the module was imported before: the thread
    that sends it keeps a child made by ``fork`` from ending.

    Raises:
        BackendError: It is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed. Install it with: pip install 'medusa-export[cpu]' (or [gpu])."
        ) from error
    return onnxruntime


class _Closed:
    """In the place of a session that is gone."""

    def __getattr__(self, _: str) -> Any:
        raise BackendError("This backend is closed: open another.")


class OnnxRuntimeBackend:
    """Runs a bundle with ONNX Runtime on the CPU, all rows in every step.

    Attributes:
        provider: The execution provider, as ONNX Runtime calls it.
        bfloat16_refusal: Why a bfloat16 bundle can't run, and what helps.

    Args:
        bundle: What to run.
        rows: Sequences held at a time.
        threads: Threads of one step; all that this process may use if None.
        graph: The graph to run, by path or as bytes; if None the derived one for so many rows, or the bundle's own.
        extra_outputs: Outputs beyond the contract that a graph has, kept for ``extra_output``.
    """

    provider = "CPUExecutionProvider"
    bfloat16_refusal = (
        "This bundle is bfloat16, which ONNX Runtime has no CPU kernels for. "
        "Export it with --dtype fp32 or fp16 to run it on a CPU."
    )

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
            raise BackendError(self.bfloat16_refusal)
        if graph is None:
            derived = ONNXRUNTIME_GRAPH if rows == 1 else ONNXRUNTIME_BATCH_GRAPH
            graph = bundle.folder / derived if derived in bundle.files else bundle.graph
        self._ort = ort
        self._bundle = bundle
        self._rows = rows
        self._threads = threads or usable_cpus()
        self._session = _open_session(ort, bundle, graph, self._threads, self.provider)
        self._dtype = np.dtype(bundle.dtype)
        self._capacity = 0
        # [2L, rows, N, C, d], the caches in the order of the contract.
        self._caches: NDArray[Any] = np.zeros((0,), self._dtype)
        self._bound: list[Bound] = []
        depth = bundle.tree.max_depth
        self._num_tokens = self._bind("num_tokens", np.zeros(rows, np.int64))
        self._is_prefill = self._bind("is_prefill", np.zeros(rows, np.bool_))
        self._carried: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._lengths = self._bind_state("cache_lengths", np.zeros(rows, np.int64), output="next_cache_lengths")
        self._sampling = SamplingRows(rows) if bundle.sampling else None
        self._logprobs: NDArray[np.float32] | None = None
        if self._sampling is not None:
            for name, array in self._sampling.inputs.items():
                self._bind(name, array)
            self._logprobs = self._bind(None, np.zeros((rows, depth + 1), np.float32), output="logprobs")
        self._pending: NDArray[Any] | None = None
        if any(value.name == "pending_kv" for value in self._session.get_inputs()):
            shape = next(spec.shape for spec in bundle.inputs if spec.name == "pending_kv")
            pending = np.zeros((rows, *map(int, shape[1:])), self._dtype)
            self._pending = self._bind_state("pending_kv", pending, output="next_pending_kv")
        self._path: NDArray[np.int64] | None = None
        if any(value.name == "accepted_path" for value in self._session.get_outputs()):
            self._path = self._bind(None, np.zeros((rows, depth + 1), np.int64), output="accepted_path")
        self._tokens = self._bind(None, np.zeros((rows, depth + 1), np.int64), output="tokens")
        self._count = self._bind(None, np.zeros(rows, np.int64), output="count")
        drafts = np.zeros((rows, bundle.tree.size), np.int64)
        self._drafts = self._bind_state(None, drafts, output="next_input_ids")
        self._result = StepResult(self._tokens, self._count, self._logprobs)
        self._extra_outputs = tuple(extra_outputs)
        self._extra: dict[str, Any] = {}
        self._varying = {spec.name: spec for spec in bundle.inputs if spec.name in ("input_ids", "exponentials")}
        self._by_width: dict[tuple[str, int], NDArray[Any]] = {}
        self._binding: Binding | None = None

    def _bind(self, name: str | None, array: NDArray[Any], *, output: str | None = None) -> NDArray[Any]:
        """Makes an array, [rows, …], the memory of an input and, or, an output."""
        self._bound.append(Bound(name, array, output))
        return array

    def _bind_state(self, name: str | None, array: NDArray[Any], *, output: str) -> NDArray[Any]:
        """Binds what a row is besides its cache: what it is now, and what a step leaves for the next."""
        if name is not None:
            self._bind(name, array)
        self._carried.append((array, self._bind(None, np.zeros_like(array), output=output)))
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
        value: NDArray[Any] = self._extra[name].numpy()
        return value

    def reserve(self, capacity: int) -> None:
        if capacity > self._capacity:
            self._resize(capacity)

    def _resize(self, capacity: int) -> None:
        capacity = rounded_capacity(capacity)
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
        kept = min(capacity, self._capacity)
        if kept:
            grown[:, :, :, :kept] = self._caches[:, :, :, :kept]
        self._caches, self._capacity = grown, capacity
        self._binding = None

    def reset(self, row: int) -> None:
        self._lengths[row] = 0

    def truncate(self, row: int, length: int) -> None:
        if length and self._pending is not None:
            self._caches[:, row], self._pending[row] = self._cut(self._caches[:, row], self._pending[row], row, length)
        self._lengths[row] = length

    def _cut(
        self, caches: NDArray[Any], pending: NDArray[Any], row: int, length: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """A row's caches with its pending entries in place, and what is pending once the row is cut to a length."""
        slots = self._bundle.slots
        newest = caches[:, :, slots.pending(int(self.lengths[row]))]
        newest[...] = pending.reshape(newest.shape)
        return caches, caches[:, :, slots.pending(length)].reshape(pending.shape)

    def scrub(self, row: int) -> None:
        if self._capacity:
            scrub_caches(self._caches[:, row], self._bundle.tree.max_depth, int(self._lengths[row]))
        self._scrub_pending(row)

    def _scrub_pending(self, row: int) -> None:
        if self._pending is not None:
            older = max(0, self._bundle.tree.max_depth - int(self._lengths[row]))
            self._pending[row, :, :older] = 0

    def assign(self, row: int, draws: Draws | None) -> None:
        if self._sampling is not None:
            self._sampling.assign(row, draws)
        elif draws is not None:
            raise BackendError("This bundle was exported with --greedy-only: it can't sample.")

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        rows = range(self._rows) if rows is None else rows
        inputs = self._write_inputs(size, prompts or {}, rows)
        if len(rows) < self._rows:  # an idle row takes in a chunk of no tokens
            idle = [row for row in range(self._rows) if row not in rows]
            inputs["input_ids"][idle], self._is_prefill[idle], self._num_tokens[idle] = 0, True, 0
        self._run(self._bindings(), size, inputs)
        self._carry_over(slice(None) if len(rows) == self._rows else list(rows))
        if self._path is not None:
            for row in rows:
                self._move_accepted(self._path, row, self._caches[:, row])
        return self._result

    def _run(self, binding: Binding, size: int, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Runs the session; ``inputs`` are those that ``_write_inputs`` gives, for the rows that are bound."""
        for name, array in inputs.items():
            binding.bind(name, array)
        self._before_run(binding)
        for name in self._extra_outputs:  # of another shape in each step
            binding.values.bind_output(name)
        try:
            self._session.run_with_iobinding(binding.values)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed in a step of {size} tokens at capacity {self.capacity}: {error}"
            ) from error
        if self._extra_outputs:
            names = [*binding.outputs, *self._extra_outputs]
            self._extra = dict(zip(names, binding.values.get_outputs(), strict=True))

    def _before_run(self, binding: Binding) -> None:
        """Whatever the provider needs once all inputs have been written."""

    def _carry_over(self, rows: slice | list[int]) -> None:
        """Makes what a step left of these rows what they are now; others keep what they are."""
        for array, following in self._carried:
            array[rows] = following[rows]

    def _move_accepted(self, path: NDArray[np.int64], row: int, cache: NDArray[Any]) -> None:
        """Moves the entries of a row's accepted nodes together, in its caches, [2L, N, C, d]; the root stays."""
        count = int(self._count[row])
        if count == 1 or self._is_prefill[row]:
            return
        nodes = path[row, 1:count]
        root = self._bundle.tree.max_depth + int(self._lengths[row]) - count
        cache[:, :, root + 1 : root + count] = cache[:, :, root + nodes]

    def _write_inputs(
        self, size: int, prompts: Mapping[int, Sequence[int]], rows: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        """Gives the inputs whose width changes from step to step, [all rows, width, …]; the others are bound."""
        ids = self._of_width("input_ids", size, np.int64)
        for row in rows:
            prompt = prompts.get(row)
            if prompt is None:
                drafted = self._drafts[row, :size]
                ids[row, : len(drafted)] = drafted
            else:
                ids[row, : len(prompt)] = prompt
                ids[row, len(prompt) :] = 0
            self._is_prefill[row] = prompt is not None
            self._num_tokens[row] = size if prompt is None else len(prompt)
        if self._sampling is None:
            return {"input_ids": ids}
        width = self._sampling.width(size, prompts, rows)
        exponentials = self._of_width("exponentials", width, np.float32)
        if width:
            self._sampling.write(exponentials, self.lengths, prompts)
        return {"input_ids": ids, "exponentials": exponentials}

    def _of_width(self, name: str, width: int, dtype: type[np.generic]) -> NDArray[Any]:
        """The same array for each width that a tree has, and one for each chunk of a prompt."""
        array = self._by_width.get((name, width))
        if array is None:
            free = {"batch": self._rows, "sequence": width, "draws": width}
            array = np.zeros(fixed_shape(self._varying[name], free), dtype)
            if width <= self._bundle.tree.size:
                self._by_width[name, width] = array
        return array

    def _bindings(self) -> Binding:
        if self._binding is None:
            caches = [self._bound_cache(index, cache) for index, cache in enumerate(self._caches)]
            self._binding = Binding(self._ort, self._session, [*self._bound, *caches])
        return self._binding

    def _bound_cache(self, index: int, cache: NDArray[Any]) -> Bound:
        """A cache, where the provider keeps it."""
        return Bound(cache_name("past", index), cache, cache_name("present", index))

    def close(self) -> None:
        self._caches = np.zeros((0,), self._dtype)
        self._capacity = 0
        self._by_width.clear()
        self._binding = None
        self._session = _Closed()


def scrub_caches(caches: NDArray[Any], margin: int, length: int) -> None:
    """Zeroes the slots of a row's caches that hold no committed entry.

    Args:
        caches: [2L, N, C, d].
        margin: M, the slots in front of the first entry.
        length: Committed entries.
    """
    caches[:, :, :margin] = 0
    caches[:, :, margin + length :] = 0


@dataclass(frozen=True)
class Bound:
    """An array, [rows, …], whose memory is an input, an output, or both.

    Attributes:
        input: The input's name.
        array: The array.
        output: The output's name.
        on_device: What is bound in its place, for all rows, if a device keeps it.
    """

    input: str | None
    array: NDArray[Any]
    output: str | None
    on_device: Any = None


class Binding:
    """The session's inputs and outputs, bound to arrays.

    Attributes:
        values: What the session runs with.
        outputs: Names of its outputs, in order.
    """

    def __init__(self, ort: Any, session: Any, bound: Sequence[Bound]) -> None:
        self._ort = ort
        self._arrays: dict[str, tuple[NDArray[Any], Any]] = {}  # inputs in the host's memory
        self._on_device: dict[str, Any] = {}
        self.values = session.io_binding()
        self.outputs: list[str] = []
        for item in bound:
            if item.input is not None and item.on_device is None:
                self._bind_array(item.input, item.array)
            elif item.input is not None:
                self._on_device[item.input] = item.on_device
                self.values.bind_ortvalue_input(item.input, item.on_device)
            if item.output is not None:
                value = ort.OrtValue.ortvalue_from_numpy(item.array) if item.on_device is None else item.on_device
                self.values.bind_ortvalue_output(item.output, value)
                self.outputs.append(item.output)

    def bind(self, name: str, array: NDArray[Any]) -> None:
        """Binds an input anew, unless this array is the one that it has."""
        if name not in self._arrays or self._arrays[name][0] is not array:
            self._bind_array(name, array)

    def refresh(self) -> None:
        """Binds all inputs anew: a provider with memory of its own copies them then, and not when it runs."""
        for name, (array, _) in list(self._arrays.items()):
            self._bind_array(name, array)
        for name, value in self._on_device.items():
            self.values.bind_ortvalue_input(name, value)

    def _bind_array(self, name: str, array: NDArray[Any]) -> None:
        self._arrays[name] = array, self._ort.OrtValue.ortvalue_from_numpy(array)
        self.values.bind_ortvalue_input(name, self._arrays[name][1])


def _open_session(ort: Any, bundle: Bundle, graph: Path | bytes, threads: int, provider: str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.folder.resolve())
    )
    # Threads fetch blocks of work where they would each have a fixed share: one that is held up holds up no other.
    options.add_session_config_entry("session.dynamic_block_base", DYNAMIC_BLOCKS)
    weights = _linked_weights(bundle)
    if weights is not None:
        options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
    try:
        session = ort.InferenceSession(
            graph if isinstance(graph, bytes) else str(graph),
            options,
            providers=[(provider, _PROVIDER_OPTIONS.get(provider, {}))],
            disabled_optimizers=["EliminateSlice"],  # there is none to eliminate, and it warns about the others
            enable_fallback=0,  # else it prints to standard output, and tries again on the CPU
        )
    except Exception as error:  # its exceptions share no base of their own
        named = bundle.graph if isinstance(graph, bytes) else graph
        raise BackendError(
            f"ONNX Runtime {ort.__version__} can't load {named}: {' '.join(str(error).split())}"
        ) from error
    if provider not in session.get_providers():  # it goes on without one that it can't start
        raise BackendError(
            f"ONNX Runtime {ort.__version__} could not start {provider}: check that the NVIDIA driver, CUDA and cuDNN "
            "are of the versions that it needs."
        )
    keep_in_children(session)
    return session


def _linked_weights(bundle: Bundle) -> mmap.mmap | None:
    """The weights where they are a link that leads outside of the folder, as in a hub's cache: ONNX Runtime refuses it.

    It copies what it needs of them, so that it takes more memory than it does for a file in the folder.
    """
    if WEIGHTS not in bundle.files or not bundle.files[WEIGHTS].size or not leads_outside(bundle.folder, WEIGHTS):
        return None
    with open_regular(bundle.folder / WEIGHTS) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

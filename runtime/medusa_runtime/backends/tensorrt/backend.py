"""The TensorRT backend: the state of all rows stays on the GPU, and a decoding step is one launch.

Caches, pending entries, lengths and drafted trees are in device memory that is bound once. Each tree size has an
execution context of its own; its second step is captured as a CUDA graph, which all later ones replay. The host reads
back ``tokens`` and ``count`` alone, and may submit the next step before it does so.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.tensorrt.buffers import ID, Buffers, ClosedBuffers, Submitted
from medusa_runtime.backends.tensorrt.choices import ChoiceSizes, DeviceChoices
from medusa_runtime.backends.tensorrt.cuda import Cuda, Stream
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary, import_tensorrt
from medusa_runtime.backends.tensorrt.loading import LoadedEngine, load_engine
from medusa_runtime.backends.tensorrt.memory import DeviceMemory, memory_budget
from medusa_runtime.backends.tensorrt.steps import EngineSteps
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import REBUILD, CompiledEngine
from medusa_runtime.bundles.contract import IS_LONG, MAX_EDITS
from medusa_runtime.errors import (
    BackendError,
    DeviceLostError,
    DoubtfulRowsError,
    OutOfDeviceMemoryError,
    RequestError,
)
from medusa_runtime.sampling import Draws

_log = logging.getLogger(__name__)
_LARGER_CHUNKS = ", or build the engine with a larger 'medusa-export trt --max-prefill'"
IN_FLIGHT = 2  # steps that may be in flight


class TensorRTBackend:
    """Runs a compiled engine; a step computes all rows.

    A row that doesn't take part in a step takes in a chunk of no tokens, which leaves its entries as they are. Its
    drafted tree is copied away before the step and back after it.

    Args:
        bundle: The bundle that the engine was built from, as the engine's folder describes it.
        description: The engine.
        rows: Sequences held at a time; with ``gpu_memory`` the most.
        library: The TensorRT to run it; the engine's flavor if None.
        cuda: The CUDA runtime on a device; NVIDIA's if None, on the GPU of number ``device``.
        device: The number of the GPU.
        capture: True if steps are captured as CUDA graphs; False to compare speeds without them.
        gpu_memory: Memory that may be used, in bytes, or as a fraction up to 1; rows that don't fit are left out.

    Raises:
        BackendError: The engine can't run here; the message says why, and how to build it again.
        RequestError: ``gpu_memory`` is not a number above 0.
    """

    def __init__(
        self,
        bundle: Bundle,
        description: CompiledEngine,
        *,
        rows: int = 1,
        library: TensorRTLibrary | None = None,
        cuda: Cuda | None = None,
        device: int = 0,
        capture: bool = True,
        gpu_memory: float | None = None,
    ) -> None:
        limits = description.limits
        if rows < 1:
            raise BackendError(f"rows is {rows}: give at least 1.")
        if rows > limits.max_batch:
            raise BackendError(
                f"The engine in {description.folder} holds 1 to {limits.max_batch} sequences, not {rows}. Take fewer "
                f"rows, or build it again with 'medusa-export trt --max-batch {rows}'."
            )
        library = library or import_tensorrt(description.flavor)
        cuda = cuda or Cuda.open(device)
        loaded = load_engine(bundle, description, library, cuda)
        self._name = f"{description.flavor} {library.version}, {loaded.device.name}"
        memory = DeviceMemory.of(bundle, description, loaded.scratch_size)
        if gpu_memory is not None:
            total = cuda.memory[1]
            rows = memory.rows_within(memory_budget(gpu_memory, total), rows, loaded.device.name, total)
        _log.info("%s takes %s", self._name, memory.words(rows))
        self._bundle, self._rows, self._limits = bundle, rows, limits
        self._loaded: LoadedEngine | None = loaded
        self._stream = Stream(cuda)
        self._buffers = Buffers(cuda, self._stream, bundle, limits, rows, loaded.scratch_size)
        self._steps = EngineSteps(loaded, self._buffers, self._stream, bundle, rows, limits.capacity, capture=capture)
        self._submitted: list[Submitted] = []
        self._next_slot = 0
        self._lengths = np.zeros(rows, np.int64)  # exact once all steps are collected
        self._drafts_shown = False  # True while the host's drafts count, not the device's
        self._idle_shown: tuple[int, ...] | None = None  # rows that sit out as the device knows; None after a prefill
        self._choices: DeviceChoices | None = None
        try:
            self._slots = self._buffers.allocate(IN_FLIGHT)
            if bundle.sampling:
                self._choices = DeviceChoices(bundle, rows, self._buffers, self._stream)
        except BackendError as error:
            with contextlib.suppress(BackendError):
                self.close()
            if not isinstance(error, OutOfDeviceMemoryError):
                raise
            raise OutOfDeviceMemoryError(
                f"{self._name} has no memory for {rows} sequences of {limits.capacity} tokens "
                f"({memory.words(rows)}): take fewer rows (gpu_memory chooses them), or build it again with a smaller "
                f"'medusa-export trt --max-seq-len'. {error}"
            ) from error

    @property
    def name(self) -> str:
        return self._name

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def capacity(self) -> int:
        return self._limits.capacity

    @property
    def max_tokens(self) -> int | None:
        return self._limits.max_prefill

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Committed entries of each row, [rows]; waits for steps in flight. Without one, it shows later changes."""
        if not self._submitted:
            return self._lengths
        lengths = self._lengths.copy()
        for step in self._submitted:
            lengths += self._committed(step)
        return lengths

    @property
    def drafts(self) -> NDArray[np.int64]:
        """The trees that the last step drafted, fetched from the device."""
        if not self._drafts_shown:
            doing = "fetching the drafted trees"
            self._stream.download(self._buffers.drafts, self._buffers.address["next_input_ids"], doing)
            self._stream.synchronize(doing)
            self._drafts_shown = True
        return self._buffers.drafts

    @property
    def uncaptured(self) -> dict[tuple[int, int], str]:
        """Why some steps are launched one by one, by tree size and numbers to draw with."""
        return self._steps.uncaptured

    def reserve(self, capacity: int) -> None:
        try:
            self.check_capacity(capacity)
        except RequestError as error:
            raise BackendError(str(error)) from error

    def check_capacity(self, capacity: int) -> None:
        if capacity > self._limits.capacity:
            raise RequestError(
                f"The engine's caches have {self._limits.capacity} slots per row, but this takes {capacity}. Ask for "
                f"less, or build the engine with 'medusa-export trt --max-seq-len {capacity}'."
            )

    @property
    def max_edits(self) -> int:
        return MAX_EDITS

    def reset(self, row: int) -> None:
        self._settle()
        self._lengths[row] = 0
        address = self._buffers.address["cache_lengths"] + row * ID.itemsize
        self._stream.zero(address, ID.itemsize, f"resetting row {row}")

    def truncate(self, row: int, length: int) -> None:
        self.copy(row, row, length)

    def copy(self, source: int, target: int, length: int) -> None:
        if length == 0:
            self.reset(target)
            return
        self._settle()
        doing = f"copying {length} entries of row {source} to row {target}"
        buffers, layout, newest = self._buffers, self._bundle.slots, int(self._lengths[source])
        for state in self._bundle.states:
            if layout.margin:  # the newest entries come to their slots, as the next step would bring them
                place = buffers.entries(state, source, layout.pending(newest).start)
                buffers.copy_entries(place, buffers.pending(state, source), layout.margin, doing)
            if target != source:
                there, here = (buffers.entries(state, row, layout.slot(0)) for row in (target, source))
                buffers.copy_entries(there, here, length, doing)
            if layout.margin:
                place = buffers.entries(state, source, layout.pending(length).start)
                buffers.copy_entries(buffers.pending(state, target), place, layout.margin, doing)
        self._lengths[target] = buffers.length[0] = length
        self._stream.upload(buffers.address["cache_lengths"] + target * ID.itemsize, buffers.length, doing)
        self._stream.synchronize(doing)

    def scrub(self, row: int) -> None:
        if self._submitted:
            raise BackendError("Steps are in flight: collect them before a row is scrubbed.")
        doing = f"scrubbing row {row}"
        margin, length = self._bundle.slots.margin, int(self._lengths[row])
        for state in self._bundle.states:
            # The next step writes the pending entries again before it reads them, so their slots may be zeroed, too.
            self._buffers.zero_entries(state.past, row, slice(length, None), doing)
            self._buffers.zero_entries(state.past, row, slice(0, min(margin, length)), doing)
        for group in self._bundle.state_groups:
            if group.pending is not None:
                self._buffers.zero_entries(group.pending, row, slice(0, self._bundle.slots.before_first(length)), doing)
        self._stream.synchronize(doing)

    def assign(self, row: int, draws: Draws | None) -> None:
        if self._choices is not None:
            self._choices.assign(row, draws)
        elif draws is not None:
            raise BackendError("This engine's bundle is greedy only: it can't sample.")

    def set_long(self, row: int, is_long: bool) -> None:
        buffers = self._buffers
        if IS_LONG.name in buffers.address and buffers.is_long[row] != is_long:
            self._settle()
            buffers.is_long[row] = is_long
            doing = f"choosing the rotary frequencies of row {row}"
            self._stream.upload(buffers.address[IS_LONG.name], buffers.is_long, doing)
            self._stream.synchronize(doing)

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        self._settle()
        self.submit(size, prompts, rows)
        return self.collect()

    def submit(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> None:
        prompts = prompts or {}
        idle = () if rows is None else tuple(row for row in range(self._rows) if row not in rows)
        self._check_step(size, prompts)
        try:
            self._launch(size, prompts, idle)
        except DeviceLostError:
            raise
        except BackendError as error:
            raise DoubtfulRowsError(f"A step failed halfway, and all rows may have changed: {error}") from error

    def _launch(self, size: int, prompts: Mapping[int, Sequence[int]], idle: tuple[int, ...]) -> None:
        """Puts a step into the stream. A failure may leave all rows changed."""
        doing = f"running a step of {size} tokens over {self._rows} rows"
        sizes = self._store_choices(size, prompts, idle, doing)
        if self._drafts_shown:
            self._stream.upload(
                self._buffers.address["next_input_ids"], self._buffers.drafts, "storing the drafted trees"
            )
            self._drafts_shown = False
        if idle:
            self._keep_drafts(doing)
        if prompts:
            self._prefill(size, sizes, prompts, idle, doing)
        else:
            self._decode(size, sizes, idle, doing)
        for row in idle:
            self._restore_draft(row, doing)
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % IN_FLIGHT
        ranks = sizes.ranked > 0
        results = slot.memory if ranks else slot.memory[: self._buffers.without_rankings]
        self._stream.download(results, self._buffers.address["tokens"], doing)
        slot.done.record(doing)
        added = {row: len(prompt) for row, prompt in prompts.items()} | dict.fromkeys(idle, 0)
        self._submitted.append(Submitted(slot, size, added, ranks))

    def collect(self) -> StepResult:
        if not self._submitted:
            raise BackendError("No step was submitted that could be collected.")
        step = self._submitted.pop(0)
        self._lengths += self._committed(step)
        return step.slot.with_rankings if step.ranks else step.slot.result

    def _committed(self, step: Submitted) -> NDArray[np.int64]:
        """Waits for a step; gives the entries that it commits in each row, none where it emits nothing."""
        step.slot.done.wait(f"waiting for a step of {step.size} tokens over {self._rows} rows")
        count = step.slot.result.count
        return np.array([step.added.get(row, int(count[row])) if count[row] else 0 for row in range(self._rows)])

    def _settle(self) -> None:
        """Discards the tokens of steps in flight, and takes note of the entries that they commit."""
        while self._submitted:
            self.collect()

    def _check_step(self, size: int, prompts: Mapping[int, Sequence[int]]) -> None:
        if self._loaded is None:
            raise BackendError("This backend is closed: load the engine again.")
        if len(self._submitted) == IN_FLIGHT:
            raise BackendError(f"{IN_FLIGHT} steps are in flight: collect one before submitting the next.")
        limit = self._limits.max_prefill if prompts else self._bundle.tree.size
        if not 1 <= size <= limit:
            what = "prefills up to" if prompts else "verifies up to"
            raise BackendError(
                f"A step of {size} tokens is not for this engine, which {what} {limit} at a time. "
                f"Take smaller ones{_LARGER_CHUNKS if prompts else ''}."
            )
        # A block written past the end would land in another sequence's cache: TensorRT doesn't check. Rows that don't
        # take part are written to as well, behind their entries.
        longest = self._lengths.copy()
        for step in self._submitted:
            for row in range(self._rows):
                longest[row] += step.added.get(row, min(step.size, self._bundle.slots.most_committed))
        if self._bundle.slots.capacity(int(longest.max()), size) > self._limits.capacity:
            raise BackendError(
                f"A step of {size} tokens after {int(longest.max())} doesn't fit into caches of "
                f"{self._limits.capacity} slots. {REBUILD.removesuffix('.')} and a larger --max-seq-len."
            )

    def _store_choices(
        self, size: int, prompts: Mapping[int, Sequence[int]], idle: tuple[int, ...], doing: str
    ) -> ChoiceSizes:
        """Stores the inputs for sampling and constraints on the device."""
        rows = [row for row in range(self._rows) if row not in idle]
        if self._choices is None or not self._choices.draws_in(size, prompts, rows):
            return ChoiceSizes()
        least = self._lengths.copy()
        for step in self._submitted:
            for row, added in step.added.items():
                least[row] += added
        return self._choices.store(size, prompts, rows, least, lambda: self.drafts, doing)

    def _decode(self, size: int, sizes: ChoiceSizes, idle: tuple[int, ...], doing: str) -> None:
        if self._idle_shown != idle:
            self._idle_shown = None
            sits_out = [row in idle for row in range(self._rows)]
            self._buffers.upload_flags([0 if out else size for out in sits_out], sits_out, doing)
            self._idle_shown = idle
        self._steps.decode(size, sizes, doing)

    def _prefill(
        self, size: int, sizes: ChoiceSizes, prompts: Mapping[int, Sequence[int]], idle: tuple[int, ...], doing: str
    ) -> None:
        """Rows in ``prompts`` take their chunk, idle rows no tokens, all others their drafted tree."""
        chunks = {**prompts, **dict.fromkeys(idle, ())}
        rows = range(self._rows)
        self._idle_shown = None
        self._buffers.upload_flags(
            [len(chunks.get(row, range(size))) for row in rows], [row in chunks for row in rows], doing
        )
        ids = self._buffers.ids.reshape(-1)[: self._rows * size].reshape(self._rows, size)
        ids[:] = 0
        for row, prompt in prompts.items():
            ids[row, : len(prompt)] = prompt
        address = self._buffers.address
        self._stream.upload(address["input_ids"], ids, doing)
        tree = self._bundle.tree.size * ID.itemsize
        for row in rows:
            if row not in chunks:
                target, source = address["input_ids"] + row * size * ID.itemsize, address["next_input_ids"] + row * tree
                self._stream.copy(target, source, min(size * ID.itemsize, tree), doing)
        self._steps.prefill(size, sizes, doing)

    def _keep_drafts(self, doing: str) -> None:
        """Copies all drafted trees to where no step writes."""
        size = self._buffers.size(self._buffers.specs["next_input_ids"])
        self._stream.copy(self._buffers.drafts_copy, self._buffers.address["next_input_ids"], size, doing)

    def _restore_draft(self, row: int, doing: str) -> None:
        tree = self._bundle.tree.size * ID.itemsize
        target, source = (
            address + row * tree for address in (self._buffers.address["next_input_ids"], self._buffers.drafts_copy)
        )
        self._stream.copy(target, source, tree, doing)

    def close(self) -> None:
        if self._loaded is None:
            return
        loaded, self._loaded = self._loaded, None
        self._submitted = []
        failures = []
        for give_back in (
            lambda: self._stream.synchronize("closing the backend"),
            *self._steps.closing,
            loaded.kernels.save,
            *self._buffers.closing,
            self._stream.close,
        ):
            try:
                give_back()
            except BackendError as error:  # what can be given back is
                failures.append(error)
        closed: Any = ClosedBuffers()
        self._buffers = self._choices = self._stream = closed
        if failures:
            raise failures[0]

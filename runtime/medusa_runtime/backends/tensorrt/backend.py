"""The TensorRT backend: the state of all rows stays on the GPU, and a step is one launch.

Caches, pending entries, lengths and drafted trees live in device memory that is bound once. Each tree size has an
execution context of its own; its second step is captured as a CUDA graph, which all later ones replay. What a step
gives for the next is copied to where that one reads it, as part of the same launch. The host reads back ``tokens``
and ``count`` alone, and may submit the next step before it does so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.tensorrt.cuda import Cuda, Event, Graph, Stream
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary, import_tensorrt
from medusa_runtime.backends.tensorrt.loading import LoadedEngine, load_engine
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import REBUILD, CompiledEngine
from medusa_runtime.bundles.contract import TensorSpec, cache_name, fixed_shape
from medusa_runtime.errors import BackendError, OutOfDeviceMemoryError
from medusa_runtime.sampling import Draws, SamplingRows, draws_ahead

ALIGNMENT = 256  # bytes, of every address that TensorRT is given
IN_FLIGHT = 2  # steps that may be submitted and not yet collected
_ID = np.dtype(np.int64)
# Outputs that the host reads, which lie side by side.
_RESULTS = ("tokens", "count", "logprobs")
# Outputs that the next step reads, and where it does.
_CARRIED = {"next_cache_lengths": "cache_lengths", "next_pending_kv": "pending_kv"}


@dataclass
class _Decoder:
    """What runs decoding steps of one size, with or without sampling.

    Attributes:
        context: The execution context, bound.
        warm: Whether it has run, which a capture needs.
        graph: The captured step, once there is one.
        refused: TensorRT's or CUDA's words where it can't be captured.
    """

    context: Any
    warm: bool = False
    graph: Graph | None = None
    refused: str = ""


@dataclass
class _Slot:
    """Where a step's results arrive in host memory."""

    results: NDArray[np.uint8]
    result: StepResult
    done: Event


@dataclass(frozen=True)
class _Submitted:
    """A step under way: where its results arrive, and the rows that prefill with how many tokens."""

    slot: _Slot
    size: int
    added: Mapping[int, int]


class TensorRTBackend:
    """Runs a compiled engine.

    Args:
        bundle: The bundle that the engine was built from, as the engine's folder describes it.
        description: The engine.
        rows: Sequences held at a time.
        library: The TensorRT to run it; the engine's flavor if None.
        cuda: The CUDA runtime; NVIDIA's if None.
        capture: Whether steps are captured as CUDA graphs, which is what one wants but to measure what they bring.

    Raises:
        BackendError: The engine can't run here; the message says why, and how to rebuild it.
    """

    def __init__(
        self,
        bundle: Bundle,
        description: CompiledEngine,
        *,
        rows: int = 1,
        library: TensorRTLibrary | None = None,
        cuda: Cuda | None = None,
        capture: bool = True,
    ) -> None:
        limits = description.limits
        if not 1 <= rows <= limits.max_batch:
            raise BackendError(
                f"The engine in {description.folder} holds 1 to {limits.max_batch} sequences, not {rows}. Build it "
                f"again with --max-batch {rows}."
            )
        library = library or import_tensorrt(description.flavor)
        self._cuda = cuda or Cuda.open()
        self._bundle, self._rows, self._limits, self._captures = bundle, rows, limits, capture
        self._loaded: LoadedEngine | None = load_engine(bundle, description, library, self._cuda)
        self._name = f"{description.flavor} {library.version}, {self._loaded.device.name}"
        self._stream = Stream(self._cuda)
        self._specs = {spec.name: spec for spec in (*bundle.inputs, *bundle.outputs)}
        self._blocks: list[int] = []  # device memory, to be freed
        self._pinned: list[NDArray[Any]] = []
        self._address: dict[str, int] = {}
        self._scratch_size = self._loaded.scratch_size
        self._scratch = 0
        self._slots: list[_Slot] = []
        self._submitted: list[_Submitted] = []
        self._next_slot = 0
        self._lengths = np.zeros(rows, np.int64)  # exact once all steps are collected
        self._drafts_shown = False
        self._all_decode = False  # whether the flags on the device say so
        self._decoders: dict[tuple[int, int], _Decoder] = {}  # by size, and numbers to draw with
        self._sampling = SamplingRows(rows) if bundle.sampling else None
        self._sampling_changed = True  # since it was stored on the device
        self._draws = draws_ahead(bundle.tree)
        self._prefiller: Any = None
        try:
            self._allocate()
        except OutOfDeviceMemoryError as error:
            self.close()  # what there was room for
            size = sum(map(self._size, self._specs.values())) + self._scratch_size
            raise OutOfDeviceMemoryError(
                f"{self._name} has no memory for {rows} sequences of {limits.capacity} tokens ({size / 2**20:,.0f} MiB "
                f"with caches): take fewer rows, or build again with a smaller --max-seq-len. {error}"
            ) from error
        except BackendError:
            self.close()
            raise

    def _size(self, spec: TensorSpec, rows: int | None = None) -> int:
        """Bytes of a tensor at this backend's rows."""
        sizes = {
            "batch": rows or self._rows,
            "capacity": self._limits.capacity,
            "sequence": self._limits.max_prefill,
            "draws": self._draws,
        }
        itemsize = 2 if spec.dtype == "bfloat16" else np.dtype(spec.dtype).itemsize
        return int(np.prod(fixed_shape(spec, sizes))) * itemsize

    def _exponentials_shape(self, draws: int) -> tuple[int, ...]:
        return fixed_shape(self._specs["exponentials"], {"batch": self._rows, "draws": draws})

    def _allocate(self) -> None:
        """All memory of this backend: one block for each tensor, and the results side by side."""
        present = {cache_name("present", i) for i in range(2 * self._bundle.model.num_layers)}
        for name, spec in self._specs.items():
            if name not in present and name not in _RESULTS:
                self._address[name] = self._block(name, self._size(spec))
        for index in range(len(present)):
            self._address[cache_name("present", index)] = self._address[cache_name("past", index)]
        places, results_size = {}, 0
        for name in _RESULTS:
            if name in self._specs:
                places[name] = results_size
                results_size += -(-self._size(self._specs[name]) // ALIGNMENT) * ALIGNMENT
        block = self._block("the results of a step", results_size)
        self._address |= {name: block + place for name, place in places.items()}
        self._scratch = self._block("the scratch memory of a step", max(self._scratch_size, ALIGNMENT))

        rows, tree = self._rows, self._bundle.tree
        self._ids = self._pin((rows, self._limits.max_prefill), _ID)
        self._num_tokens = self._pin((rows,), _ID)
        self._is_prefill = self._pin((rows,), np.bool_)
        self._drafts = self._pin((rows, tree.size), _ID)
        self._length = self._pin((1,), _ID)
        if self._sampling is not None:
            self._exponentials = self._pin(self._exponentials_shape(self._draws), np.float32)
            for name, array in self._sampling.inputs.items():
                self._sampling.inputs[name] = self._pin(array.shape, array.dtype)
                self._sampling.inputs[name][:] = array
        for _ in range(IN_FLIGHT):
            results = self._pin((results_size,), np.uint8)
            arrays = {name: self._part(results, name, place) for name, place in places.items()}
            self._slots.append(_Slot(results, StepResult(**arrays), self._stream.event()))

    def _part(self, results: NDArray[np.uint8], name: str, place: int) -> NDArray[Any]:
        """One of a step's results among them all."""
        spec = self._specs[name]
        part: NDArray[Any] = results[place : place + self._size(spec)].view(spec.dtype)
        return part.reshape(fixed_shape(spec, {"batch": self._rows}))

    def _block(self, name: str, size: int) -> int:
        doing = f"allocating {size:,} bytes for {name}"
        address = self._cuda.allocate(size, doing)
        self._blocks.append(address)
        self._stream.zero(address, size, doing)  # slots that no token has reached must hold numbers
        return address

    def _pin(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        self._pinned.append(self._cuda.pinned(shape, dtype))
        return self._pinned[-1]

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
        """Committed entries per row, [rows], once the steps under way are done; waits for them."""
        lengths = self._lengths.copy()
        for step in self._submitted:
            lengths += self._committed(step)
        return lengths

    @property
    def drafts(self) -> NDArray[np.int64]:
        """As of the last step, fetched from the device; what stands here then is what the next step verifies."""
        if not self._drafts_shown:
            doing = "fetching the drafted trees"
            self._stream.download(self._drafts, self._address["next_input_ids"], doing)
            self._stream.synchronize(doing)
            self._drafts_shown = True
        return self._drafts

    def reserve(self, capacity: int) -> None:
        if capacity > self._limits.capacity:
            raise BackendError(
                f"The engine's caches have {self._limits.capacity} slots per sequence, but this takes {capacity}. Ask "
                f"for less, or build the engine with --max-seq-len {capacity}."
            )

    def reset(self, row: int) -> None:
        self._settle()
        self._lengths[row] = 0
        address = self._address["cache_lengths"] + row * _ID.itemsize
        self._stream.zero(address, _ID.itemsize, f"resetting row {row}")

    def truncate(self, row: int, length: int) -> None:
        self.copy(row, row, length)

    def copy(self, source: int, target: int, length: int) -> None:
        if length == 0:
            self.reset(target)
            return
        self._settle()
        doing = f"copying {length} entries of row {source} to row {target}"
        layout, newest = self._bundle.slots, int(self._lengths[source])
        margin = layout.margin
        for index in range(2 * self._bundle.model.num_layers):
            cache = cache_name("past", index)
            if margin:  # the newest entries come to their places, as the next step would write them
                pending = self._entries("pending_kv", source, 0, index)
                self._copy_entries(self._entries(cache, source, newest), pending, margin, doing)
            if target != source:
                there, here = (self._entries(cache, row, layout.slot(0)) for row in (target, source))
                self._copy_entries(there, here, length, doing)
            if margin:
                pending = self._entries("pending_kv", target, 0, index)
                self._copy_entries(pending, self._entries(cache, source, length), margin, doing)
        self._length[:] = self._lengths[target] = length
        self._stream.upload(self._address["cache_lengths"] + target * _ID.itemsize, self._length, doing)
        self._stream.synchronize(doing)

    def _entries(self, name: str, row: int, slot: int, index: int = 0) -> tuple[int, int]:
        """The address of a slot of a row in a tensor [B, heads, slots, d], and the bytes from head to head.

        Args:
            name: The tensor.
            row: The row.
            slot: The slot, of the first head.
            index: For pending entries, the cache that they belong to.
        """
        spec = self._specs[name]
        _, heads, slots, _ = fixed_shape(spec, {"batch": self._rows, "capacity": self._limits.capacity})
        row_size = self._size(spec) // self._rows
        pitch = row_size // heads
        first = index * self._bundle.model.num_key_value_heads
        return self._address[name] + row * row_size + first * pitch + slot * (pitch // slots), pitch

    def _copy_entries(self, target: tuple[int, int], source: tuple[int, int], count: int, doing: str) -> None:
        """Copies ``count`` slots of every head of one cache within the device."""
        model = self._bundle.model
        width = self._size(self._specs[cache_name("past", 0)], 1) // (model.num_key_value_heads * self._limits.capacity)
        self._stream.copy_rows(*target, *source, count * width, model.num_key_value_heads, doing)

    def scrub(self, row: int) -> None:
        if self._submitted:
            raise BackendError("Steps are under way: collect them before a row is scrubbed.")
        doing = f"scrubbing row {row}"
        depth, length = self._bundle.tree.max_depth, int(self._lengths[row])
        for index in range(2 * self._bundle.model.num_layers):
            # The next step writes the last M committed entries again, before it reads them.
            self._zero_slots(cache_name("past", index), row, slice(length, None), doing)
            self._zero_slots(cache_name("past", index), row, slice(0, min(depth, length)), doing)
        if "pending_kv" in self._specs:
            self._zero_slots("pending_kv", row, slice(0, max(depth - length, 0)), doing)
        self._stream.synchronize(doing)

    def _zero_slots(self, name: str, row: int, slots: slice, doing: str) -> None:
        """Sets slots of a row to zero in a tensor of shape [B, heads, slots, d]."""
        spec = self._specs[name]
        _, heads, count, _ = fixed_shape(spec, {"batch": self._rows, "capacity": self._limits.capacity})
        row_size = self._size(spec) // self._rows
        head_size = row_size // heads
        slot_size = head_size // count
        start, stop, _ = slots.indices(count)
        if stop > start:
            first = self._address[name] + row * row_size + start * slot_size
            self._stream.zero_rows(first, head_size, (stop - start) * slot_size, heads, doing)

    def assign(self, row: int, draws: Draws | None) -> None:
        if self._sampling is None:
            if draws is not None:
                raise BackendError("This engine's bundle was exported with --greedy-only: it can't sample.")
            return
        self._stream.synchronize("changing how a row samples")  # the device may still read what it was
        self._sampling.assign(row, draws)
        self._sampling_changed = True

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
        if rows is not None and len(rows) < self._rows:
            raise BackendError("This backend runs all its rows in every step.")
        self._check_step(size, prompts)
        if self._drafts_shown:
            self._stream.upload(self._address["next_input_ids"], self._drafts, "storing the drafted trees")
            self._drafts_shown = False
        doing = f"running a step of {size} tokens over {self._rows} rows"
        width = self._store_sampling(size, prompts, doing)
        if prompts:
            self._prefill(size, width, prompts, doing)
        else:
            self._decode(size, width, doing)
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % IN_FLIGHT
        self._stream.download(slot.results, self._address["tokens"], doing)
        slot.done.record(doing)
        self._submitted.append(_Submitted(slot, size, {row: len(prompt) for row, prompt in prompts.items()}))

    def collect(self) -> StepResult:
        if not self._submitted:
            raise BackendError("No step was submitted that could be collected.")
        step = self._submitted.pop(0)
        self._lengths += self._committed(step)
        return step.slot.result

    def _committed(self, step: _Submitted) -> NDArray[np.int64]:
        """Waits for a step; how many entries it commits in each row: none in one that emits nothing."""
        step.slot.done.wait(f"waiting for a step of {step.size} tokens over {self._rows} rows")
        count = step.slot.result.count
        return np.array([step.added.get(row, int(count[row])) if count[row] else 0 for row in range(self._rows)])

    def _settle(self) -> None:
        """Discards what steps under way emit, and takes note of what they commit."""
        while self._submitted:
            self.collect()

    def _check_step(self, size: int, prompts: Mapping[int, Sequence[int]]) -> None:
        if self._loaded is None:
            raise BackendError("This backend is closed: load the engine again.")
        if len(self._submitted) == IN_FLIGHT:
            raise BackendError(f"{IN_FLIGHT} steps are under way: collect one before submitting the next.")
        tree, depth = self._bundle.tree.size, self._bundle.tree.max_depth
        limit = self._limits.max_prefill if prompts else tree
        if not 1 <= size <= limit:
            what = "prefills up to" if prompts else "verifies up to"
            raise BackendError(
                f"A step of {size} tokens is not for this engine, which {what} {limit} at a time. "
                f"Take smaller ones{', or build it with a larger --max-prefill' if prompts else ''}."
            )
        # A block written past the end would land in another sequence's cache: TensorRT doesn't check.
        longest = self._lengths.copy()
        for step in self._submitted:
            for row in range(self._rows):
                longest[row] += step.added.get(row, min(step.size, depth + 1))
        if depth + int(longest.max()) + size > self._limits.capacity:
            raise BackendError(
                f"A step of {size} tokens after {int(longest.max())} doesn't fit into caches of "
                f"{self._limits.capacity} slots. {REBUILD.removesuffix('.')} and a larger --max-seq-len."
            )

    def _store_sampling(self, size: int, prompts: Mapping[int, Sequence[int]], doing: str) -> int:
        """What rows sample with, to the device; how many numbers per row that is.

        The numbers do for all places that a step may reach, even if the one before it has not been collected. A number
        that a step under way may still read keeps its place and its value.
        """
        if self._sampling is None or not self._sampling.width(size, prompts, range(self._rows)):
            return 0
        least = self._lengths.copy()
        for step in self._submitted:
            for row, added in step.added.items():
                least[row] += added
        self._sampling.write(self._exponentials, least, prompts)
        self._stream.upload(self._address["exponentials"], self._exponentials, doing)
        if self._sampling_changed:
            for name, array in self._sampling.inputs.items():
                self._stream.upload(self._address[name], array, doing)
            self._sampling_changed = False
        return self._draws

    def _decode(self, size: int, width: int, doing: str) -> None:
        if not self._all_decode:
            self._set_flags(np.full(self._rows, size), np.zeros(self._rows, np.bool_), doing)
            self._all_decode = True
        decoder = self._decoders.get((size, width))
        if decoder is None:
            decoder = self._decoders[size, width] = _Decoder(self._context(0, size, width, eager=True))
        if self._captures and decoder.graph is None and decoder.warm and not decoder.refused:
            self._capture(decoder, size, doing)
        if decoder.graph is not None:
            decoder.graph.launch(doing)
            return
        self._decode_once(decoder, size, doing)
        decoder.warm = True

    def _decode_once(self, decoder: _Decoder, size: int, doing: str) -> None:
        """The first ``size`` nodes of each drafted tree, through the engine."""
        width, pitch = size * _ID.itemsize, self._bundle.tree.size * _ID.itemsize
        ids, drafts = self._address["input_ids"], self._address["next_input_ids"]
        self._stream.copy_rows(ids, width, drafts, pitch, width, self._rows, doing)
        self._execute(decoder.context, doing)

    def _capture(self, decoder: _Decoder, size: int, doing: str) -> None:
        """Makes the step a graph, or notes why it can't be captured."""
        assert self._loaded is not None
        able = getattr(decoder.context, "is_stream_capturable", lambda _: True)  # TensorRT for all GPUs can't tell
        if not able(self._stream.handle):
            decoder.refused = f"not capturable: {self._loaded.words()}"
            return
        try:
            decoder.graph = self._stream.capture(lambda: self._decode_once(decoder, size, doing), f"capturing, {doing}")
        except BackendError as error:
            decoder.refused = str(error)

    @property
    def uncaptured(self) -> dict[tuple[int, int], str]:
        """Why some steps are launched one by one, by tree size and numbers to draw with."""
        return {key: decoder.refused for key, decoder in self._decoders.items() if decoder.refused}

    def _prefill(self, size: int, width: int, prompts: Mapping[int, Sequence[int]], doing: str) -> None:
        """Rows in ``prompts`` take their chunk, all others their drafted tree."""
        self._stream.synchronize(doing)  # until then the device may still read what is written next
        ids = self._ids.reshape(-1)[: self._rows * size].reshape(self._rows, size)
        ids[:] = 0
        for row, prompt in prompts.items():
            ids[row, : len(prompt)] = prompt
        decodes = np.array([row not in prompts for row in range(self._rows)])
        valid = np.array([len(prompts.get(row, range(size))) for row in range(self._rows)])
        self._set_flags(valid, ~decodes, doing)
        self._all_decode = False
        self._stream.upload(self._address["input_ids"], ids, doing)
        tree = self._bundle.tree.size * _ID.itemsize
        for row in np.flatnonzero(decodes).tolist():
            target = self._address["input_ids"] + row * size * _ID.itemsize
            source = self._address["next_input_ids"] + row * tree
            self._stream.copy(target, source, min(size * _ID.itemsize, tree), doing)
        if self._prefiller is None:
            self._prefiller = self._context(1, size, width, eager=False)
        self._set_input_shape(self._prefiller, "input_ids", (self._rows, size), doing)
        if self._sampling is not None:
            self._set_input_shape(self._prefiller, "exponentials", self._exponentials_shape(width), doing)
        self._execute(self._prefiller, doing)

    def _set_flags(self, num_tokens: NDArray[np.int64], is_prefill: NDArray[np.bool_], doing: str) -> None:
        self._stream.synchronize(doing)
        self._num_tokens[:], self._is_prefill[:] = num_tokens, is_prefill
        self._stream.upload(self._address["num_tokens"], self._num_tokens, doing)
        self._stream.upload(self._address["is_prefill"], self._is_prefill, doing)

    def _execute(self, context: Any, doing: str) -> None:
        """One enqueue, and its state to where the next step reads it."""
        assert self._loaded is not None
        if not self._agrees(context.execute_async_v3, self._stream.handle):
            raise BackendError(f"TensorRT failed while {doing}: {self._loaded.words()}")
        for source, target in _CARRIED.items():
            if source in self._address:
                size = self._size(self._specs[target])
                self._stream.copy(self._address[target], self._address[source], size, doing)

    def _agrees(self, call: Callable[..., bool], *arguments: Any) -> bool:
        """Calls TensorRT; False if it refuses, as its Python bindings may raise where the C++ interface says so."""
        assert self._loaded is not None
        try:
            return call(*arguments)
        except RuntimeError as error:
            self._loaded.log.errors.append(str(error))
            return False

    def _context(self, profile: int, size: int, width: int, *, eager: bool) -> Any:
        """An execution context for steps of a size, with everything bound."""
        assert self._loaded is not None
        doing = f"preparing steps of {size} tokens over {self._rows} rows"
        context = self._loaded.new_context(eager=eager)
        if not self._agrees(context.set_optimization_profile_async, profile, self._stream.handle):
            raise BackendError(f"TensorRT failed while {doing}, at profile {profile}: {self._loaded.words()}")
        sizes = {"batch": self._rows, "sequence": size, "draws": width, "capacity": self._limits.capacity}
        for spec in self._bundle.inputs:
            self._set_input_shape(context, spec.name, fixed_shape(spec, sizes), doing)
        for name, address in self._address.items():
            if not self._agrees(context.set_tensor_address, name, address):
                raise BackendError(f"TensorRT failed while {doing}, at the address of {name}: {self._loaded.words()}")
        context.set_device_memory(self._scratch, self._scratch_size)
        self._stream.synchronize(doing)
        return context

    def _set_input_shape(self, context: Any, name: str, shape: tuple[int, ...], doing: str) -> None:
        assert self._loaded is not None
        if not self._agrees(context.set_input_shape, name, shape):
            raise BackendError(f"TensorRT refused {list(shape)} for {name} while {doing}: {self._loaded.words()}")

    def close(self) -> None:
        if self._loaded is None:
            return
        self._stream.synchronize("closing the backend")
        for decoder in self._decoders.values():
            if decoder.graph is not None:
                decoder.graph.close()
        self._decoders.clear()
        self._loaded.kernels.save()
        self._prefiller = self._loaded = None
        for slot in self._slots:
            slot.done.close()
        for address in self._blocks:
            self._cuda.free(address)
        for array in self._pinned:
            self._cuda.unpin(array)
        self._blocks, self._pinned, self._slots, self._submitted = [], [], [], []
        self._stream.close()

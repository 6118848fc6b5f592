"""Memory of the TensorRT backend: one block on the device for each tensor, and page-locked memory of the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.tensorrt.cuda import Cuda, Event, Stream
from medusa_runtime.backends.tensorrt.memory import largest_shape, tensor_bytes
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import EngineLimits
from medusa_runtime.bundles.contract import TensorSpec, fixed_shape
from medusa_runtime.bundles.states import State
from medusa_runtime.errors import BackendError
from medusa_runtime.sampling import draws_ahead

ALIGNMENT = 256  # bytes, of every address that TensorRT is given
ID = np.dtype(np.int64)
# Outputs that the host reads. They are beside each other, so that one copy brings all of them, or all but the rankings.
RANKINGS = ("top_tokens", "top_logprobs")
RESULTS = ("tokens", "count", "logprobs", *RANKINGS)


@dataclass
class ResultSlot:
    """Host memory for the results of one step.

    Attributes:
        memory: All results, side by side.
        result: The same memory as arrays, without the most likely tokens.
        with_rankings: As ``result``, with the most likely tokens.
        done: Recorded behind the copy to this memory.
    """

    memory: NDArray[np.uint8]
    result: StepResult
    with_rankings: StepResult
    done: Event


@dataclass(frozen=True)
class Submitted:
    """A step in flight.

    Attributes:
        slot: The memory for its results.
        size: S.
        added: Tokens that each prefilling row takes in, by row; 0 for rows that don't take part.
        ranks: True if the step gives the most likely tokens.
    """

    slot: ResultSlot
    size: int
    added: Mapping[int, int]
    ranks: bool = False


@dataclass(frozen=True)
class Entries:
    """Consecutive slots of all heads of one row in one state, or of its pending entries, on the device.

    Attributes:
        address: The address of the first slot of the first head.
        pitch: Bytes from head to head.
        heads: The number of heads.
        size: Bytes of one slot of one head.
    """

    address: int
    pitch: int
    heads: int
    size: int


class ClosedBuffers:
    """Stands in the place of what a closed backend gave back: CUDA would use memory that may be another's by now."""

    def __getattr__(self, _: str) -> Any:
        raise BackendError("This backend is closed: load the engine again.")


class Buffers:
    """All memory of the backend.

    Args:
        cuda: The CUDA runtime.
        stream: The stream that the memory is used in.
        bundle: The bundle.
        limits: The engine's limits.
        rows: The number of rows (B).
        scratch_size: Bytes of scratch memory that a step needs.

    Attributes:
        specs: Inputs and outputs of the graph by name.
        address: Addresses of inputs and outputs on the device. Caches are updated in place, so ``present_*`` have the
            addresses of ``past_*``.
        scratch: Address of the scratch memory.
        scratch_size: Its bytes.
        drafts_copy: Address of memory for a copy of all drafted trees.
        ids: Pinned, [B, max_prefill].
        num_tokens: Pinned, [B].
        is_prefill: Pinned, [B].
        is_long: Pinned, [B].
        drafts: Pinned, [B, T].
        length: Pinned, [1].
        draws: Tokens per row whose random numbers are uploaded for a step (W).
        without_rankings: Bytes of results before the most likely tokens.
    """

    def __init__(
        self, cuda: Cuda, stream: Stream, bundle: Bundle, limits: EngineLimits, rows: int, scratch_size: int
    ) -> None:
        self._cuda, self._stream, self._bundle, self._limits, self._rows = cuda, stream, bundle, limits, rows
        self.specs = {spec.name: spec for spec in (*bundle.inputs, *bundle.outputs)}
        self.draws = draws_ahead(bundle.tree)
        self.scratch_size = scratch_size
        self.address: dict[str, int] = {}
        self._blocks: list[int] = []
        self._pinned: list[NDArray[Any]] = []
        self._slots: list[ResultSlot] = []

    def allocate(self, in_flight: int) -> list[ResultSlot]:
        """Allocates everything. After a failure ``closing`` gives back the memory that was allocated before it.

        Args:
            in_flight: Steps that may be in flight.

        Returns:
            A slot for the results of each of them.

        Raises:
            OutOfDeviceMemoryError: The device has no memory for it.
        """
        present = {state.present for state in self._bundle.states}
        for name, spec in self.specs.items():
            if name not in present and name not in RESULTS:
                self.address[name] = self._block(name, self.size(spec))
        for state in self._bundle.states:
            self.address[state.present] = self.address[state.past]
        places, results_size = {}, 0
        for name in RESULTS:
            if name in self.specs:
                places[name] = results_size
                results_size += -(-self.size(self.specs[name]) // ALIGNMENT) * ALIGNMENT
                if name not in RANKINGS:
                    self.without_rankings = results_size
        results = self._block("the results of a step", results_size)
        self.address |= {name: results + place for name, place in places.items()}
        self.scratch = self._block("the scratch memory of a step", max(self.scratch_size, ALIGNMENT))
        self.drafts_copy = self._block("a copy of drafted trees", self.size(self.specs["next_input_ids"]))

        rows = self._rows
        self.ids = self.pin((rows, self._limits.max_prefill), ID)
        self.num_tokens = self.pin((rows,), ID)
        self.is_prefill = self.pin((rows,), np.bool_)
        self.is_long = self.pin((rows,), np.bool_)
        self.drafts = self.pin((rows, self._bundle.tree.size), ID)
        self.length = self.pin((1,), ID)
        for _ in range(in_flight):
            memory = self.pin((results_size,), np.uint8)
            arrays = {name: self._part(memory, name, place) for name, place in places.items()}
            plain = StepResult(**{name: array for name, array in arrays.items() if name not in RANKINGS})
            self._slots.append(ResultSlot(memory, plain, StepResult(**arrays), self._stream.event()))
        return self._slots

    def _part(self, memory: NDArray[np.uint8], name: str, place: int) -> NDArray[Any]:
        """A result of a step, as an array over its part of the memory for all results."""
        spec = self.specs[name]
        part: NDArray[Any] = memory[place : place + self.size(spec)].view(spec.dtype)
        return part.reshape(fixed_shape(spec, {"batch": self._rows}))

    def _block(self, name: str, size: int) -> int:
        doing = f"allocating {size:,} bytes for {name}"
        address = self._cuda.allocate(size, doing)
        self._blocks.append(address)
        self._stream.zero(address, size, doing)  # slots that no token has reached have to hold numbers
        return address

    def pin(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A zeroed array in page-locked host memory, which ``closing`` gives back."""
        self._pinned.append(self._cuda.pinned(shape, dtype))
        return self._pinned[-1]

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The largest shape of a tensor at this number of rows."""
        return largest_shape(spec, self._bundle, self._limits, self._rows)

    def size(self, spec: TensorSpec) -> int:
        """Bytes of a tensor."""
        return tensor_bytes(spec, self._bundle, self._limits, self._rows)

    def entries(self, state: State, row: int, slot: int) -> Entries:
        """The entries of a row in a state, from a slot on."""
        return self._entries(state.past, row, slot, 0, state.shape[0])

    def pending(self, state: State, row: int) -> Entries:
        """The pending entries of a row in a state."""
        group = next(group for group in self._bundle.state_groups if state in group.states)
        assert group.pending is not None
        heads = state.shape[0]
        return self._entries(group.pending, row, 0, group.states.index(state) * heads, heads)

    def _entries(self, name: str, row: int, slot: int, head: int, heads: int) -> Entries:
        """Entries of ``heads`` heads from ``head`` on, in a tensor of shape [B, heads, slots, d]."""
        spec = self.specs[name]
        _, all_heads, slots, _ = self.shape(spec)
        row_size = self.size(spec) // self._rows
        pitch = row_size // all_heads
        address = self.address[name] + row * row_size + head * pitch + slot * (pitch // slots)
        return Entries(address, pitch, heads, pitch // slots)

    def copy_entries(self, target: Entries, source: Entries, count: int, doing: str) -> None:
        """Copies ``count`` slots of all heads of a state within the device."""
        self._stream.copy_rows(
            target.address, target.pitch, source.address, source.pitch, count * source.size, source.heads, doing
        )

    def zero_entries(self, name: str, row: int, slots: slice, doing: str) -> None:
        """Sets slots of a row to zero in all heads of a tensor of shape [B, heads, slots, d]."""
        _, heads, count, _ = self.shape(self.specs[name])
        start, stop, _ = slots.indices(count)
        if stop > start:
            first = self._entries(name, row, start, 0, heads)
            self._stream.zero_rows(first.address, first.pitch, (stop - start) * first.size, heads, doing)

    def upload_flags(self, num_tokens: Sequence[int], is_prefill: Sequence[bool], doing: str) -> None:
        """Writes the number of tokens and the kind of work of each row in the steps that follow, [B] each."""
        self._stream.synchronize(doing)  # until then the device may still read what is written next
        self.num_tokens[:], self.is_prefill[:] = num_tokens, is_prefill
        self._stream.upload(self.address["num_tokens"], self.num_tokens, doing)
        self._stream.upload(self.address["is_prefill"], self.is_prefill, doing)

    @property
    def closing(self) -> list[Callable[[], None]]:
        """The calls that give all memory back, each to be called once. Nothing may be in flight then."""
        return [
            *(slot.done.close for slot in self._slots),
            *(partial(self._cuda.free, address) for address in self._blocks),
            *(partial(self._cuda.unpin, array) for array in self._pinned),
        ]

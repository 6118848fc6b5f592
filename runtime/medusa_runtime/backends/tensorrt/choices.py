"""The inputs that rows choose their tokens with, in device memory: sampling parameters, random numbers, constraints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.tensorrt.buffers import Buffers
from medusa_runtime.backends.tensorrt.cuda import Stream
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.contract import MAX_EDITS, RANKED_PLACES
from medusa_runtime.errors import BackendError
from medusa_runtime.sampling import Draws, SamplingRows


@dataclass(frozen=True)
class ChoiceSizes:
    """Sizes of a step's inputs for sampling and constraints, by the names of dimensions in the graph's contract.

    Attributes:
        draws: Tokens per row that may be drawn (W).
        edits: Tokens per row whose logits may change (P).
        masks: Nodes per row with a mask of allowed tokens (A).
        ranked: Places per row that need the most likely tokens (Q).
    """

    draws: int = 0
    edits: int = 0
    masks: int = 0
    ranked: int = 0


class DeviceChoices:
    """The inputs of a graph that samples, in the memory of the device.

    Args:
        bundle: The bundle.
        rows: The number of rows (B).
        buffers: All memory of the backend, allocated.
        stream: The stream that steps run in.

    Raises:
        OutOfDeviceMemoryError: There is no page-locked memory left.
    """

    def __init__(self, bundle: Bundle, rows: int, buffers: Buffers, stream: Stream) -> None:
        self._buffers, self._stream = buffers, stream
        self._sampling = SamplingRows.of(bundle, rows, rounds_up=True)
        self._changed = True  # True if rows have changed since their values were stored on the device
        self._stored: Mapping[str, NDArray[Any]] | None = None  # the constraints on the device
        self._staged: dict[str, NDArray[np.uint8]] = {}  # the memory that they are copied from
        # The device copies from page-locked memory by itself.
        self._exponentials = buffers.pin(buffers.shape(buffers.specs["exponentials"]), np.float32)
        self._has_places = False  # True once the places are on the device, where they stay the same
        for name, array in self._sampling.inputs.items():
            self._sampling.inputs[name] = buffers.pin(array.shape, array.dtype)
            self._sampling.inputs[name][:] = array

    def assign(self, row: int, draws: Draws | None) -> None:
        """Sets how a row draws its tokens from its next step on, as ``Backend.assign`` does."""
        self._stream.synchronize("changing how a row samples")  # the device may still read the old values
        self._sampling.assign(row, draws)
        self._changed = True

    def draws_in(self, size: int, prompts: Mapping[int, Sequence[int]], rows: Sequence[int]) -> bool:
        """True if a row draws tokens in a step of ``size`` tokens, with these chunks of prompts, of these rows."""
        return self._sampling.width(size, prompts, rows) > 0

    def store(
        self,
        size: int,
        prompts: Mapping[int, Sequence[int]],
        rows: Sequence[int],
        lengths: NDArray[np.int64],
        drafts: Callable[[], NDArray[np.int64]],
        doing: str,
    ) -> ChoiceSizes:
        """Stores the inputs that the rows of a step choose their tokens with on the device.

        Call it for steps that draw (``draws_in``). The random numbers are for all places that the step may reach, even
        if the step before it has not been collected. A number that a step in flight may still read keeps its place and
        its value.

        Args:
            size: Tokens per row of the step (S).
            prompts: Chunks of prompts, by row.
            rows: The rows of the step.
            lengths: The least number of committed entries that each row may have.
            drafts: Gives the drafted trees [B, T] in host memory, where a grammar may replace drafts.
            doing: The action that this is part of, for the message of a failure.
        """
        self._sampling.write(self._exponentials, lengths, prompts)
        self._stream.upload(self._buffers.address["exponentials"], self._exponentials, doing)
        if self._changed:
            for name, array in self._sampling.inputs.items():
                self._stream.upload(self._buffers.address[name], array, doing)
            self._changed = False
        draws = self._buffers.draws
        ranked = self._store_places(rows, doing)
        constraints = self._sampling.constraints
        if constraints is None:
            return ChoiceSizes(draws, ranked=ranked)
        given = constraints.of_step(size, draws, prompts, rows, drafts)
        edits, masks = given["edit_tokens"].shape[2], given["allowed_tokens"].shape[1]
        if edits > MAX_EDITS:
            raise BackendError(f"The constraints name {edits} tokens, and an engine takes {MAX_EDITS} per row.")
        if given is not self._stored:
            self._upload(given, doing)
        return ChoiceSizes(draws, edits, masks, ranked)

    def _store_places(self, rows: Sequence[int], doing: str) -> int:
        """Stores the places that need the most likely tokens: all places, or none. Gives their number (Q)."""
        places = self._sampling.ranked_places(self._buffers.draws, (), rows)
        ranked = int(places[RANKED_PLACES.name].shape[1]) if places else 0
        if ranked and not self._has_places:
            self._upload_staged(places, doing)
            self._has_places = True
        return ranked

    def _upload(self, given: Mapping[str, NDArray[Any]], doing: str) -> None:
        """Copies constraints to the device, through page-locked memory."""
        self._stored = None
        self._upload_staged(given, doing)
        self._stored = given

    def _upload_staged(self, given: Mapping[str, NDArray[Any]], doing: str) -> None:
        """Copies inputs to the device, through page-locked memory of their own."""
        self._stream.synchronize(doing)  # until then the device may still read what is written next
        for name, array in given.items():
            if array.size:
                if name not in self._staged:
                    self._staged[name] = self._buffers.pin((self._buffers.size(self._buffers.specs[name]),), np.uint8)
                part = self._staged[name][: array.nbytes]
                part[:] = array.reshape(-1).view(np.uint8)
                self._stream.upload(self._buffers.address[name], part, doing)

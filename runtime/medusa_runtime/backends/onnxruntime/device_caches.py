"""Caches and pending entries of all rows, as values of ONNX Runtime on a device.

ONNX Runtime copies whole values between host and device, and no parts. So changes of single rows, which are rare, go
through the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.onnxruntime.binding import Binding, Bound
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.contract import fixed_shape, pending_specs
from medusa_runtime.bundles.slots import rounded_capacity
from medusa_runtime.errors import BackendError


class DeviceCaches:
    """The states of a fixed number of rows on a device.

    Args:
        ort: The module ``onnxruntime``.
        device: ONNX Runtime's name of the device.
        bundle: The bundle.
        rows: The number of rows.

    Attributes:
        capacity: Slots per row (C).
        values: The caches, [rows, N, C, d] each, in the order of the contract.
        pending: Two values by name of the input with pending entries, [rows, n·N, M, d]: the entries that the next step
            reads, and the memory for those that it leaves to the step after it. Empty if the tree has no depth.
    """

    def __init__(self, ort: Any, device: str, bundle: Bundle, rows: int) -> None:
        self._ort, self._device, self._bundle, self._rows = ort, device, bundle, rows
        self.capacity = 0
        self.values: list[Any] = []
        self.pending: dict[str, list[Any]] = {}
        for spec in pending_specs(bundle.states, bundle.dtype):
            shape = fixed_shape(spec, {"batch": rows})
            self.pending[spec.name] = [self._on_device(np.zeros(shape, spec.dtype)) for _ in range(2)]

    def _on_device(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    @property
    def bound(self) -> list[Bound]:
        """The memory to bind a session to; pending entries change places in each step, see ``bind_pending``."""
        return [
            Bound(state.past, state.present, on_device=value)
            for state, value in zip(self._bundle.states, self.values, strict=True)
        ]

    def grow(self, capacity: int) -> None:
        """Makes room for more slots; all rows keep their entries.

        Raises:
            BackendError: There is no memory for it; nothing has changed.
        """
        capacity = rounded_capacity(capacity)
        grown = []
        try:
            for index, state in enumerate(self._bundle.states):
                heads, size = state.shape
                # slots that no token has reached have to hold numbers
                cache = np.zeros((self._rows, heads, capacity, size), state.dtype or self._bundle.dtype)
                if self.values:
                    cache[:, :, : self.capacity] = self.values[index].numpy()
                grown.append(self._on_device(cache))
        except (MemoryError, RuntimeError) as error:  # of the host, or of the device
            size = self._rows * capacity * self._bundle.entry_bytes
            raise BackendError(
                f"There is no memory for caches of {capacity} slots in {self._rows} rows ({size / 2**20:,.0f} MiB): "
                f"{error}"
            ) from error
        self.values, self.capacity = grown, capacity

    def bind_pending(self, binding: Binding) -> None:
        """Binds pending entries for the next step."""
        for name, (now, following) in self.pending.items():
            binding.values.bind_ortvalue_input(name, now)
            binding.values.bind_ortvalue_output(f"next_{name}", following)

    def commit_pending(self) -> None:
        """Makes the entries that a step wrote the pending entries. Call it once the step has succeeded."""
        for values in self.pending.values():
            values.reverse()

    def truncate(self, row: int, newest: int, length: int) -> None:
        """Sets the pending entries of a row that is cut from ``newest`` entries to ``length``, at least one."""
        if newest == length:
            return
        layout, values = self._bundle.slots, dict(zip(self._bundle.states, self.values, strict=True))
        for group in self._bundle.state_groups:
            if group.pending is None:
                continue
            on_device, heads = self.pending[group.pending][0], group.shape[0]
            pending = on_device.numpy()
            for index, state in enumerate(group.states):
                entries = values[state].numpy()[row]
                own = pending[row, index * heads : (index + 1) * heads]
                entries[:, layout.pending(newest)] = own  # where the next step would write them
                own[:] = entries[:, layout.pending(length)]
            on_device.update_inplace(pending)

    def scrub(self, row: int, length: int) -> None:
        """Overwrites the slots that a row of ``length`` entries does not use, for ``Backend.scrub``."""
        committed = self._bundle.slots.committed(length)
        for value in self.values:
            cache = value.numpy()
            cache[row, :, : committed.start] = 0
            cache[row, :, committed.stop :] = 0
            value.update_inplace(cache)
        for on_device, _ in self.pending.values():
            pending = on_device.numpy()
            pending[row, :, : self._bundle.slots.before_first(length)] = 0
            on_device.update_inplace(pending)

    def close(self) -> None:
        """Gives all memory back."""
        self.values, self.pending, self.capacity = [], {}, 0

"""Caches and pending entries of all rows, as values of ONNX Runtime on a device.

ONNX Runtime copies whole values between host and device, and no parts. So what changes single rows, which is seldom
needed, goes through the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.onnxruntime.binding import Binding, Bound
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.contract import cache_name, fixed_shape
from medusa_runtime.bundles.slots import rounded_capacity
from medusa_runtime.errors import BackendError


class DeviceCaches:
    """The K/V caches of a fixed number of rows on a device.

    Args:
        ort: The module ``onnxruntime``.
        device: ONNX Runtime's name of the device.
        bundle: The bundle.
        rows: The number of rows.

    Attributes:
        capacity: Slots per row (C).
        values: The caches, [rows, N, C, d] each, in the order of the contract.
        pending: Pending entries, [rows, 2L·N, M, d], as the next step reads them, and the memory for what it leaves
            to the one after; empty if the tree has no depth.
    """

    def __init__(self, ort: Any, device: str, bundle: Bundle, rows: int) -> None:
        self._ort, self._device, self._bundle, self._rows = ort, device, bundle, rows
        self.capacity = 0
        self.values: list[Any] = []
        self.pending: list[Any] = []
        for spec in bundle.inputs:
            if spec.name == "pending_kv":
                shape = fixed_shape(spec, {"batch": rows})
                self.pending = [self._on_device(np.zeros(shape, spec.dtype)) for _ in range(2)]

    def _on_device(self, array: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    @property
    def bound(self) -> list[Bound]:
        """The memory to bind a session to; pending entries change places in each step, see ``bind_pending``."""
        return [
            Bound(cache_name("past", index), cache_name("present", index), on_device=value)
            for index, value in enumerate(self.values)
        ]

    def grow(self, capacity: int) -> None:
        """Makes room for more slots; all rows keep their entries.

        Raises:
            BackendError: There is no memory for it; nothing has changed.
        """
        capacity = rounded_capacity(capacity)
        model = self._bundle.model
        shape = (self._rows, model.num_key_value_heads, capacity, model.head_dim)
        grown = []
        try:
            for index in range(2 * model.num_layers):
                cache = np.zeros(shape, self._bundle.dtype)  # slots that no token has reached have to hold numbers
                if self.values:
                    cache[:, :, : self.capacity] = self.values[index].numpy()
                grown.append(self._on_device(cache))
        except (MemoryError, RuntimeError) as error:  # of the host, or of the device
            size = 2 * model.num_layers * int(np.prod(shape)) * np.dtype(self._bundle.dtype).itemsize
            raise BackendError(
                f"There is no memory for caches of {capacity} slots in {self._rows} rows ({size / 2**20:,.0f} MiB): "
                f"{error}"
            ) from error
        self.values, self.capacity = grown, capacity

    def bind_pending(self, binding: Binding) -> None:
        """Binds pending entries for the next step."""
        if self.pending:
            now, following = self.pending
            binding.values.bind_ortvalue_input("pending_kv", now)
            binding.values.bind_ortvalue_output("next_pending_kv", following)

    def commit_pending(self) -> None:
        """Makes what a step left the pending entries; call it once the step has succeeded."""
        self.pending.reverse()

    def truncate(self, row: int, newest: int, length: int) -> None:
        """Makes pending what is pending once a row of ``newest`` entries is cut to ``length`` of them, at least one."""
        if not self.pending or newest == length:
            return
        pending = self.pending[0].numpy()
        heads = self._bundle.model.num_key_value_heads
        layout = self._bundle.slots
        for index, value in enumerate(self.values):
            entries = value.numpy()[row]
            own = pending[row, index * heads : (index + 1) * heads]
            entries[:, layout.pending(newest)] = own  # where the next step would write them
            own[:] = entries[:, layout.pending(length)]
        self.pending[0].update_inplace(pending)

    def scrub(self, row: int, length: int) -> None:
        """As ``Backend.scrub``, for a row of ``length`` entries."""
        committed = self._bundle.slots.committed(length)
        for value in self.values:
            cache = value.numpy()
            cache[row, :, : committed.start] = 0
            cache[row, :, committed.stop :] = 0
            value.update_inplace(cache)
        if self.pending:
            pending = self.pending[0].numpy()
            pending[row, :, : self._bundle.slots.before_first(length)] = 0
            self.pending[0].update_inplace(pending)

    def close(self) -> None:
        """Gives all memory back."""
        self.values, self.pending, self.capacity = [], [], 0

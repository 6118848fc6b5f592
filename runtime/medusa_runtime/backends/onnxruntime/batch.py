"""ONNX Runtime on the CPU for a service: steps of some rows while the others wait.

What belongs to a row and is small is gathered before a step and put back after it, unless it failed: so any rows can
take part, and a step that fails leaves them as they were. Caches are where a ``RowStore`` puts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.onnxruntime.backend import Binding, Bound, OnnxRuntimeBackend, scrub_caches
from medusa_runtime.backends.onnxruntime.row_store import Block, RowStore, Window
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.contract import cache_name
from medusa_runtime.errors import BackendError


class OnnxRuntimeBatchBackend(OnnxRuntimeBackend):
    """Runs some of its rows at a time.

    Args:
        bundle: What to run.
        rows: Sequences held at a time.
        threads: Threads of one step; all that this process may use if None.
        graph: As for ``OnnxRuntimeBackend``.
    """

    def __init__(
        self, bundle: Bundle, *, rows: int, threads: int | None = None, graph: Path | bytes | None = None
    ) -> None:
        super().__init__(bundle, rows=rows, threads=threads, graph=graph)
        model, depth = bundle.model, bundle.tree.max_depth
        self._store = RowStore(
            self._lengths,
            num_caches=2 * model.num_layers,
            heads=model.num_key_value_heads,
            head_dim=model.head_dim,
            margin=depth,
            dtype=self._dtype,
        )
        # What a step reads and writes: its rows come first in these, in the order in which their caches lie.
        self._staged = [np.zeros_like(item.array) for item in self._bound]
        self._windows: dict[tuple[Block, int, int], Binding] = {}

    @property
    def capacity(self) -> int:
        return self._store.capacity

    def reserve(self, capacity: int) -> None:
        self.arrange(range(self._rows), capacity)

    def approach(self, rows: Sequence[int], capacity: int, at_most: int) -> bool:
        return self._store.approach(rows, capacity, at_most)

    def arrange(self, rows: Sequence[int], capacity: int) -> int:
        before = self._store.moved
        self._store.arrange(rows, capacity)
        self._windows = {key: binding for key, binding in self._windows.items() if key[0] in self._store.blocks}
        return self._store.moved - before

    def copy(self, source: int, target: int, length: int) -> None:
        if length == 0:
            self.reset(target)
            return
        depth = self._bundle.tree.max_depth
        if self._pending is not None:
            # The newest entries are still pending: they come to their place, as the next step would bring them.
            newest = int(self._lengths[source])
            entries = self._store.row(source)[:, :, newest : newest + depth]
            entries[:] = self._pending[source].reshape(entries.shape)
        if target != source:
            self._store.copy(source, target, length)
        if self._pending is not None:
            entries = self._store.row(target)[:, :, length : length + depth]
            self._pending[target] = entries.reshape(self._pending[target].shape)
        self._lengths[target] = length

    def scrub(self, row: int) -> None:
        if self._store.holds(row):
            scrub_caches(self._store.row(row), self._bundle.tree.max_depth, int(self._lengths[row]))
        self._scrub_pending(row)

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        window = self._store.window(range(self._rows) if rows is None else rows)
        if window is None:
            raise BackendError(f"Rows {rows} are not beside each other: call arrange before a step.")
        order = list(window.rows)
        inputs = {name: array[order] for name, array in self._write_inputs(size, prompts or {}, order).items()}
        for item, staged in zip(self._bound, self._staged, strict=True):
            if item.input is not None:
                staged[: len(order)] = item.array[order]
        self._run(self._window(window), size, inputs)
        for item, staged in zip(self._bound, self._staged, strict=True):
            if item.output is not None:
                item.array[order] = staged[: len(order)]
        self._carry_over(order)
        if self._path is not None:
            for row in order:
                self._move_accepted(self._path, row, self._store.row(row))
        return self._result

    def _window(self, window: Window) -> Binding:
        """The bindings for steps of neighbouring rows."""
        count = len(window.rows)
        key = (window.block, window.start, count)
        if key not in self._windows:
            bound = [
                Bound(item.input, staged[:count], item.output)
                for item, staged in zip(self._bound, self._staged, strict=True)
            ]
            bound += [
                Bound(cache_name("past", index), cache, cache_name("present", index))
                for index, cache in enumerate(window.caches)
            ]
            self._windows[key] = Binding(self._ort, self._session, bound)
        return self._windows[key]

    def close(self) -> None:
        super().close()
        self._store.clear()
        self._windows.clear()

"""ONNX Runtime on the CPU: every buffer is bound once, caches are updated in place, and rows are moved.

The graphs that are derived for ONNX Runtime carry no accepted entries from step to step. They say which nodes they
accepted, and this backend moves the few entries below the root to their slots. A plain step moves none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.onnxruntime.binding import Binding, Bound
from medusa_runtime.backends.onnxruntime.cache_blocks import Block, CacheGroup, Window
from medusa_runtime.backends.onnxruntime.row_rules import RowRule, row_rule
from medusa_runtime.backends.onnxruntime.row_state import StagedRows
from medusa_runtime.backends.onnxruntime.row_store import RowStore
from medusa_runtime.backends.onnxruntime.session import CPU, derived_graph
from medusa_runtime.backends.onnxruntime.session_backend import SessionBackend
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.errors import BackendError

_log = logging.getLogger(__name__)


class OnnxRuntimeBackend(SessionBackend):
    """Runs a bundle with ONNX Runtime on the CPU; a step computes the rows that take part, and no others.

    Args:
        bundle: The bundle.
        rows: Sequences held at a time.
        threads: Threads of one step; all that this process may use if None.
        graph: The graph to run, as a path or as bytes; if None the one that was derived for this number of rows, or the
            bundle's own.
        extra_outputs: Outputs of the graph beyond the contract, to be kept for ``extra_output``.

    Raises:
        BackendError: ONNX Runtime is not installed, or it can't load the graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        rows: int = 1,
        threads: int | None = None,
        graph: Path | bytes | None = None,
        extra_outputs: Sequence[str] = (),
    ) -> None:
        if bundle.dtype == "bfloat16":
            raise BackendError(
                "This bundle is bfloat16, which ONNX Runtime has no CPU kernels for. "
                "Export it in fp32 or fp16 to run it on a CPU."
            )
        graph = derived_graph(bundle, rows) if graph is None else graph
        super().__init__(bundle, graph, CPU, rows=rows, threads=threads, extra_outputs=extra_outputs)
        self._store = RowStore(
            self._state.lengths,
            groups=[
                CacheGroup(len(group.states), group.shape, np.dtype(group.dtype or bundle.dtype))
                for group in bundle.state_groups
            ],
            margin=bundle.slots.margin,
        )
        self._all_rows = tuple(range(rows))
        self._staged = StagedRows(self._state.bound) if rows > 1 else None
        self._bindings: dict[tuple[Block, int, int, bool], Binding] = {}
        self._windows: dict[tuple[int, ...], Window] = {}
        self._known_changes = 0  # the store's count of changes when these windows were found
        self._rule = self._row_rule(graph)

    def _row_rule(self, graph: Path | bytes) -> RowRule:
        """The numbers of rows for which steps are exact. Warns if there are none, and the export did not ask for it."""
        if not self._bundle.weights.has_integers or graph == self._bundle.graph:
            return RowRule.ANY
        rule = row_rule(self._ort, self._bundle)
        if rule is RowRule.NONE and not self._bundle.fused_attention:
            _warn_of_inexact(self._ort.__version__, self._bundle)
        return rule

    @property
    def exact_rows(self) -> RowRule:
        """The numbers of rows of a product with integers that give each row the same bits. Steps keep to it."""
        return self._rule

    @property
    def rows_differ(self) -> bool:
        return self._rule is RowRule.NONE

    @property
    def name(self) -> str:
        return f"onnxruntime {self._ort.__version__}, CPU, {self._threads} threads"

    @property
    def capacity(self) -> int:
        return self._store.capacity

    def reserve(self, capacity: int) -> None:
        window = self._store.window(self._all_rows)
        if window is None or window.block.capacity < capacity:
            self._arrange(self._all_rows, capacity, exact=True)

    def prepare_arrange(self, rows: Sequence[int], capacity: int, at_most: int) -> bool:
        return self._store.prepare_arrange(rows, capacity, at_most)

    def arrange(self, rows: Sequence[int], capacity: int) -> int:
        before = self._store.moved
        self._arrange(rows, capacity)
        return self._store.moved - before

    def _arrange(self, rows: Sequence[int], capacity: int, *, exact: bool = False) -> Window:
        window = self._store.arrange(rows, capacity, exact=exact)
        self._forget_moved()
        return window

    def truncate(self, row: int, length: int) -> None:
        self.copy(row, row, length)

    def copy(self, source: int, target: int, length: int) -> None:
        if length == 0:
            self.reset(target)
            return
        layout, pending = self._bundle.slots, self._state.pending
        if pending:
            # The newest entries are still pending: they come to their slots, as the next step would bring them.
            for caches, entries in zip(self._store.row(source), pending, strict=True):
                newest = caches[:, :, layout.pending(int(self.lengths[source]))]
                newest[:] = entries[source].reshape(newest.shape)
        if target != source:
            self._store.copy(source, target, length)
        if pending:
            for caches, entries in zip(self._store.row(target), pending, strict=True):
                entries[target] = caches[:, :, layout.pending(length)].reshape(entries[target].shape)
        self.lengths[target] = length

    def scrub(self, row: int) -> None:
        if self._store.holds(row):
            for caches in self._store.row(row):
                scrub_slots(caches, self._bundle.slots.committed(int(self.lengths[row])))
        self._state.scrub(row)

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        taking_part = self._all_rows if rows is None else tuple(rows)
        size, prompts = self._exact_step(size, prompts or {}, taking_part)
        window = self._window(taking_part, size)
        order = list(window.rows)
        inputs = self._state.write_inputs(size, prompts, order)
        direct = window.rows == self._all_rows
        binding = self._binding(window, direct=direct)
        if self._staged is not None and not direct:
            inputs = {name: array[order] for name, array in inputs.items()}
            self._staged.gather(order)
        for name, array in inputs.items():
            binding.bind(name, array)
        self._run(binding, order, size, window.block.capacity)
        if self._staged is not None and not direct:
            self._staged.scatter(order)
        self._state.commit(None if direct else order)
        if self._state.path is not None:
            for row in order:
                self._move_accepted(row, self._state.path[row])
        return self._state.result

    def _exact_step(
        self, size: int, prompts: Mapping[int, Sequence[int]], rows: Sequence[int]
    ) -> tuple[int, Mapping[int, Sequence[int]]]:
        """Size and prompts of a step with the same results, in which the bits of a row don't depend on other rows.

        A chunk of a prompt becomes larger by tokens that count for nothing. So does a plain step, which takes in the
        root of each tree as a prompt. A tree loses its last node instead: a further one might be in the next panel.
        """
        if self._rule.allows(size * len(rows)):
            return size, prompts
        if size == 1:
            roots = {row: [int(self._state.drafts[row, 0])] for row in rows}
            return 2, roots | dict(prompts)
        return (size + 1 if prompts else size - 1), prompts

    def _window(self, rows: tuple[int, ...], size: int) -> Window:
        """The window of rows that step together; moves them if they aren't beside each other, or have no room."""
        self._forget_moved()
        lengths = self._state.lengths.tolist()
        needed = self._bundle.slots.capacity(max(lengths[row] for row in rows), size)
        window = self._windows.get(rows) or self._store.window(rows)
        if window is None or window.block.capacity < needed:
            window = self._arrange(rows, needed)
        self._windows[rows] = window
        return window

    def _forget_moved(self) -> None:
        """Forgets windows if rows were moved, and the bindings of blocks that are gone."""
        if self._known_changes != self._store.changes:
            self._known_changes = self._store.changes
            self._windows.clear()
            self._bindings = {key: binding for key, binding in self._bindings.items() if key[0] in self._store.blocks}

    def _binding(self, window: Window, *, direct: bool) -> Binding:
        """The binding for steps of neighbouring rows.

        Args:
            window: The places of these rows.
            direct: True to bind the arrays of all rows, which are in the order of the caches; False for staged copies.
        """
        count = len(window.rows)
        key = (window.block, window.start, count, direct)
        binding = self._bindings.get(key)
        if binding is None:
            bound = self._state.bound if direct or self._staged is None else self._staged.bound(count)
            caches = [
                Bound(state.past, state.present, cache)
                for group, arrays in zip(self._bundle.state_groups, window.caches, strict=True)
                for state, cache in zip(group.states, arrays, strict=True)
            ]
            binding = self._bindings[key] = self._new_binding([*bound, *caches])
        return binding

    def _move_accepted(self, row: int, path: NDArray[np.int64]) -> None:
        """Moves the entries of the nodes on a row's accepted path behind its root, which stays where it is."""
        count = int(self._state.result.count[row])
        if count <= 1 or self._state.is_prefill[row]:
            return
        nodes = path[:count].tolist()
        first = next((depth for depth, node in enumerate(nodes) if node != depth), None)
        if first is None:  # most paths: the likeliest nodes are the first ones of the tree
            return
        root = self._bundle.slots.slot(int(self.lengths[row]) - count)
        for caches in self._store.row(row):
            caches[:, :, root + first : root + count] = caches[:, :, root + path[first:count]]

    def close(self) -> None:
        self._close_session()
        self._bindings.clear()
        self._store.clear()


def _warn_of_inexact(version: str, bundle: Bundle) -> None:
    """Logs a warning that the tokens of a bundle may depend on the tree size."""
    reason = (
        f"it computes in {bundle.dtype}, has a head_dim of {max(state.shape[1] for state in bundle.states)}, or is a "
        "mixture of experts"
        if not bundle.has_exact_rows
        else f"the products of ONNX Runtime {version} depend on the number of rows on this processor"
    )
    _log.warning(
        "Answers of this bundle may differ between tree sizes, because it has weights in integers and %s. See "
        "docs/concepts/exact.md.",
        reason,
    )


def scrub_slots(caches: NDArray[Any], committed: slice) -> None:
    """Sets all slots of states, [n, N, C, d], to zero but the committed ones."""
    caches[:, :, : committed.start] = 0
    caches[:, :, committed.stop :] = 0

"""The base of the ONNX Runtime backends: a session, and the state of rows in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.onnxruntime.binding import Binding, Bound
from medusa_runtime.backends.onnxruntime.row_state import RowState
from medusa_runtime.backends.onnxruntime.session import ClosedSession, import_onnxruntime, open_session
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.common.cpus import usable_cpus
from medusa_runtime.errors import BackendError
from medusa_runtime.sampling import Draws


class SessionBackend:
    """Runs a session over bound memory. A subclass keeps the caches, and defines ``reserve`` to ``step`` with them.

    Args:
        bundle: The bundle.
        graph: The graph to run, as a path or as bytes.
        provider: ONNX Runtime's name of the execution provider.
        rows: Sequences held at a time.
        threads: Threads of one step; all that this process may use if None.
        extra_outputs: Outputs of the graph beyond the contract, to be kept for ``extra_output``.
        pending: True if pending entries are kept in host memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: Path | bytes,
        provider: str,
        *,
        rows: int,
        threads: int | None,
        extra_outputs: Sequence[str] = (),
        pending: bool = True,
    ) -> None:
        self._ort = import_onnxruntime()
        self._bundle, self._rows, self._threads = bundle, rows, threads or usable_cpus()
        self._session = open_session(bundle, graph, threads=self._threads, provider=provider)
        inputs = {value.name for value in self._session.get_inputs()}
        outputs = {value.name for value in self._session.get_outputs()}
        self._state = RowState(bundle, rows, inputs, outputs, pending=pending)
        self._extra_outputs = tuple(extra_outputs)
        self._extra: dict[str, Any] = {}
        self._order: list[int] = []  # the rows of the last step, as the session saw them

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def max_tokens(self) -> int | None:
        return None

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._state.lengths

    @property
    def drafts(self) -> NDArray[np.int64]:
        return self._state.drafts

    def reset(self, row: int) -> None:
        self._state.lengths[row] = 0

    def assign(self, row: int, draws: Draws | None) -> None:
        self._state.assign(row, draws)

    def set_long(self, row: int, is_long: bool) -> None:
        self._state.is_long[row] = is_long

    def extra_output(self, name: str) -> NDArray[Any]:
        value: NDArray[Any] = self._extra[name].numpy()
        return value[np.argsort(self._order)] if len(value) else value  # a plain step computes some for no rows

    def _new_binding(self, bound: Sequence[Bound]) -> Binding:
        return Binding(self._ort, self._session, bound)

    def _run(self, binding: Binding, order: list[int], size: int, capacity: int) -> None:
        """Runs the session once.

        Args:
            binding: Its inputs and outputs.
            order: The rows, in the order in which they are bound.
            size: S, for the message of a failure.
            capacity: C, for the same.
        """
        rankings = self._state.new_rankings(len(order))
        for name, array in rankings.items():
            binding.bind_output(name, array)
        for name in self._extra_outputs:  # of another shape in each step
            binding.values.bind_output(name)
        try:
            self._session.run_with_iobinding(binding.values)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed in a step of {size} tokens at capacity {capacity}: {error}"
            ) from error
        self._state.take_rankings(rankings, order)
        if self._extra_outputs:
            names = [*binding.outputs, *self._extra_outputs]
            self._extra = dict(zip(names, binding.values.get_outputs(), strict=True))
            self._order = order

    def _close_session(self) -> None:
        self._extra.clear()
        self._session = ClosedSession()

"""Steps of a batch: room in the caches, the tree that fits the load, and which request a failure belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from medusa_runtime.backends.base import BatchBackend, StepResult
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BackendError
from medusa_runtime.latency import LatencyTable
from medusa_runtime.sequence import check_tree_size

TreeSize = int | Literal["auto"]


class BatchRunner:
    """Runs steps of some rows.

    Args:
        bundle: What the backend runs.
        backend: It.
        tree_size: Nodes per row and step; ``auto`` takes what has the best expected speed for so many rows at a time.

    Raises:
        RequestError: The bundle has no tree of that size.
    """

    def __init__(self, bundle: Bundle, backend: BatchBackend, tree_size: TreeSize) -> None:
        if tree_size != "auto":
            check_tree_size(bundle, tree_size)
        self.backend = backend
        self._bundle = bundle
        self._tree_size = tree_size
        self._best: dict[int, int] = {}

    def measure(self) -> None:
        """Finds out which tree is best for how many rows, so far as nobody has measured it on this machine before."""
        acceptance, most = self._bundle.acceptance, self.backend.rows
        if self._tree_size != "auto" or acceptance.expected_tokens(self._bundle.tree.size) <= 1.0:
            return
        counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < most]
        for count in [*counts, most]:
            table = LatencyTable.measured_batch(self._bundle, self.backend, count)
            self._best[count] = table.best_size(acceptance)

    def tree_size(self, active: int) -> int:
        """Nodes per row in a step of so many rows."""
        if self._tree_size != "auto":
            return self._tree_size
        return next((size for count, size in sorted(self._best.items()) if count >= active), 1)

    def prefill(self, row: int, chunk: Sequence[int], active: int) -> StepResult:
        """Takes in a chunk of a row's prompt; ``active`` rows will decode once it is the last one.

        Raises:
            BackendError: The graph failed, or there is no memory; the row is as it was.
        """
        # Padded to the size of the tree: a step of S tokens drafts at most S - 1 deep.
        return self._step(max(len(chunk), self.tree_size(active)), {row: chunk}, [row])

    def decode(self, rows: Sequence[int]) -> tuple[StepResult, int]:
        """Verifies the trees of some rows; gives also their size.

        Raises:
            BackendError: As for ``prefill``.
        """
        size = self.tree_size(len(rows))
        return self._step(size, {}, rows), size

    def take_over(self, source: int, row: int, shared: int) -> None:
        """Begins a request in a row with the first entries of another one, or with what it has of them itself.

        Raises:
            BackendError: There is no memory.
        """
        if source != row:
            self.backend.reset(row)
            if shared:
                self._arrange([row], shared + 1)
        self.backend.copy(source, row, shared)

    def _step(self, size: int, prompts: Mapping[int, Sequence[int]], rows: Sequence[int]) -> StepResult:
        self._arrange(rows, int(self.backend.lengths[list(rows)].max()) + size)
        try:
            return self.backend.step(size, prompts, rows)
        except BackendError:
            raise
        except Exception as error:  # others go on, whatever a backend raises
            raise BackendError(f"A step of {size} tokens for {len(rows)} requests failed: {error!r}.") from error

    def _arrange(self, rows: Sequence[int], entries: int) -> None:
        try:
            self.backend.arrange(rows, self._bundle.tree.max_depth + entries)
        except MemoryError as error:
            raise BackendError(f"There is no room for {entries} tokens in {len(rows)} rows.") from error

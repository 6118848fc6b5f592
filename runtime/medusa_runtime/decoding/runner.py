"""The runner: runs steps of a backend, one at a time or ahead of the host, and checks the rows of a failed step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import (
    Backend,
    StepResult,
    StepsAhead,
    can_copy_rows,
    can_move_rows,
    can_set_long,
    can_step_ahead,
)
from medusa_runtime.backends.shield import shielded
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.decoding.retry import retried
from medusa_runtime.decoding.room import GrownRoom, MovedRoom, Room, SharedRoom
from medusa_runtime.decoding.tree_choice import TreeSizes
from medusa_runtime.errors import BackendError, DeviceLostError, DoubtfulRowsError
from medusa_runtime.tuning import MOST_SCORES, SHARED_CHUNK


class StepsInFlight:
    """Steps of one row that are submitted before the result of the last one is known.

    Args:
        backend: The backend.
        on_wait: Called before the host waits for a step, when other threads can take Python's lock.
    """

    def __init__(self, backend: StepsAhead, on_wait: Callable[[], None]) -> None:
        self._backend = backend
        self._on_wait = on_wait
        self._sizes: deque[int] = deque()

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def run(self, row: int, wanted: int, next_size: Callable[[], int]) -> tuple[int, StepResult]:
        """Submits steps until ``wanted`` are in flight, and collects the oldest one.

        A step that emits nothing leaves the row as it was. The one behind it may emit, so that is collected next.

        Args:
            row: The row.
            wanted: Steps to have in flight: 1 or 2.
            next_size: Chooses the tree size of a step.

        Returns:
            The tree size of the step that was collected last, and its result.

        Raises:
            BackendError: The device failed.
        """
        while len(self._sizes) < wanted:
            size = next_size()
            self._backend.submit(size, None, [row])
            self._sizes.append(size)
        self._on_wait()
        while True:
            size = self._sizes.popleft()
            result = self._backend.collect()
            if result.count[row] or not self._sizes:
                return size, result

    def discard(self) -> None:
        """Gives up the steps in flight, without waiting. The backend drops what they emit when the row is cut."""
        self._sizes.clear()


class StepRunner:
    """Runs steps of some rows.

    Args:
        bundle: The bundle that the backend runs.
        backend: The backend. Exceptions of other libraries become ``BackendError``.
        sizes: The tree sizes of steps.
        on_wait: Called before the host waits for a step, when other threads can take Python's lock.

    Attributes:
        backend: The backend, which raises errors of this project only.
        room: Makes room for steps.
        in_flight: Steps ahead of the host; None if the backend can't do that.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, sizes: TreeSizes, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        self.backend = backend = shielded(backend)
        self._bundle = bundle
        self._sizes = sizes
        self._on_wait = on_wait
        self.room = _room(bundle, backend, sizes)
        self.in_flight = StepsInFlight(backend, on_wait) if can_step_ahead(backend) else None
        self._copier = backend if can_copy_rows(backend) else None
        self._long_rows = backend if bundle.model.short_positions is not None and can_set_long(backend) else None

    @property
    def copies(self) -> bool:
        """True if entries can be copied from one row to another."""
        return self._copier is not None

    @property
    def most_nodes(self) -> int:
        """Nodes of the whole tree (T)."""
        return self._bundle.tree.size

    @property
    def deepest_hit(self) -> int:
        """The most tokens of a lookup hit that a tree has nodes for."""
        return min(self._sizes.largest - 1, self._bundle.tree.max_depth)

    def chunk_limit(self, wanted: int, length: int) -> int:
        """The most tokens of a prompt that one step takes in, ``wanted`` at most.

        Args:
            wanted: Tokens.
            length: Tokens of the row before the chunk.
        """
        limit = min(wanted, self.backend.max_tokens or wanted)
        if self._bundle.panel is None:
            return limit
        return min(limit, max(SHARED_CHUNK, MOST_SCORES // (length + limit)))

    def tree_size(self, rows: Sequence[int], hits: Collection[int]) -> int:
        """Nodes per row in the next step of these rows: those of ``TreeSizes``, or fewer to keep to a panel.

        A prompt needs no such limit: its tokens are in the same slots whatever the chunks. Neither do backends that
        step ahead: they run the standard graph.

        Args:
            rows: The rows.
            hits: Rows that have a lookup hit.

        Raises:
            BackendError: The backend can't tell the lengths of rows.
        """
        size = self._sizes.of(rows, hits)
        panel = self._bundle.panel
        if panel is None or size == 1:
            return size
        lengths = self.backend.lengths
        return min(self._bundle.slots.size_within_panel(int(lengths[row]), size, panel) for row in rows)

    def chunk_size(self, row: int, chunk: int, beside: Sequence[int]) -> int:
        """The size of the step that takes in a chunk: padded, if need be, so that it drafts the tree that follows.

        Args:
            row: The chunk's row.
            chunk: Tokens of the chunk.
            beside: Rows that the row will decode with.
        """
        return max(chunk, min(self._bundle.drafting_size, self._sizes.outlook([*beside, row])))

    def admit(self, row: int, source: int, shared: int, *, is_long: bool) -> None:
        """Begins a request in a row, with the first entries of its own last text or of another row.

        Args:
            row: The row.
            source: The row whose entries it reuses.
            shared: Number of these entries.
            is_long: True if the request takes the rotary frequencies of long ones.

        Raises:
            BackendError: There is no memory, the backend failed, or it knows no long requests.
        """
        if self._long_rows is not None:
            self._long_rows.set_long(row, is_long)
        elif is_long:
            raise BackendError("This backend knows no rotary frequencies of long requests: give a shorter prompt.")
        self._sizes.choice.begin(row)
        if source == row:
            self._truncate(row, shared)
            return
        assert self._copier is not None
        self.backend.reset(row)
        if shared:
            self.room.make_for_copy(row, shared)
        self._copier.copy(source, row, shared)

    def _truncate(self, row: int, length: int) -> None:
        if length:
            self.backend.truncate(row, length)
        else:
            self.backend.reset(row)

    def prefill(self, row: int, chunk: Sequence[int], size: int) -> StepResult:
        """Takes in a chunk of a row's prompt, in a step of ``size`` tokens.

        Raises:
            DoubtfulRowsError: The step failed, and the row is not known to be as it was.
            BackendError: The step failed, or there is no room.
        """
        return self._step(size, {row: chunk}, [row])

    def decode(
        self,
        rows: Sequence[int],
        size: int,
        hits: Mapping[int, Sequence[int]],
        chunks: Mapping[int, Sequence[int]] | None = None,
    ) -> StepResult:
        """Verifies the trees of some rows, while others may take in chunks of their prompts.

        Args:
            rows: The rows that verify their trees.
            size: Tokens per row. Trees are verified up to their last node.
            hits: Lookup hits by row: the next tokens.
            chunks: Chunks of prompts by row.

        Raises:
            DoubtfulRowsError: As for ``prefill``.
            BackendError: As for ``prefill``.
        """
        nodes = min(size, self._bundle.tree.size)
        if nodes > 1:
            for row, tokens in hits.items():
                self._bundle.tree.insert(tokens, self.backend.drafts[row], nodes)
        result = self._step(size, chunks or {}, [*rows, *(chunks or ())])
        emitted = {row: int(result.count[row]) for row in rows if result.count[row]}
        self._sizes.observe(nodes, emitted, hits)
        return result

    def decode_ahead(self, row: int, *, is_sure: bool) -> tuple[int, StepResult]:
        """Verifies the tree of a row, and submits the step after it before the result is looked at.

        Args:
            row: The row, the only one that runs, and without lookup.
            is_sure: True if one more step is needed after the one in flight, unless a stop ends the text. No step
                may go past the tokens asked for, nor past the end of the caches.

        Returns:
            Nodes of the step, and its result.

        Raises:
            DoubtfulRowsError: The device failed.
            BackendError: There is no room.
        """
        assert self.in_flight is not None
        if not self.in_flight:  # this holds to the end of the text, as other rows don't grow meanwhile
            self.room.make([row], self._sizes.largest)
        try:
            size, result = self.in_flight.run(row, 1 + is_sure, lambda: self._sizes.of([row]))
        except (DeviceLostError, DoubtfulRowsError):
            raise
        except BackendError as error:
            raise _doubtful([row], error) from error
        if result.count[row]:
            self._sizes.observe(size, {row: int(result.count[row])})
        return size, result

    def retry(self, row: int, chunk: Sequence[int] = ()) -> StepResult:
        """Repeats a step that emitted nothing for a row: its chunk without padding, or a plain step.

        Raises:
            NotFiniteError: It emits nothing again.
            BackendError: As for ``prefill``.
        """
        size, prompts = (len(chunk), {row: chunk}) if chunk else (1, {})
        result = retried(self.backend, row, self._bundle.dtype, lambda: self._step(size, prompts, [row]))
        if not chunk:
            self._sizes.observe(1, {row: int(result.count[row])})
        return result

    def _step(self, size: int, prompts: Mapping[int, Sequence[int]], rows: Sequence[int]) -> StepResult:
        self.room.make(rows, size)
        # Where the state is on a device, comparing it costs more than it is worth.
        before = self._state() if self.in_flight is None else None
        self._on_wait()
        try:
            return self.backend.step(size, prompts, rows)
        except (DeviceLostError, DoubtfulRowsError):
            raise
        except BackendError as error:
            if before is None or not self._is_still(before, rows):
                raise _doubtful(rows, error) from error
            raise

    def _state(self) -> list[NDArray[np.int64]]:
        """A copy of the state of all rows that every step changes. To copy some rows only takes longer."""
        return [self.backend.lengths.copy(), self.backend.drafts.copy()]

    def _is_still(self, before: Sequence[NDArray[np.int64]], rows: Sequence[int]) -> bool:
        """True if rows are as they were before a step; False if the backend can't say."""
        chosen = list(rows)
        try:
            return all(np.array_equal(old[chosen], new[chosen]) for old, new in zip(before, self._state(), strict=True))
        except BackendError:
            return False


def _room(bundle: Bundle, backend: Backend, sizes: TreeSizes) -> Room:
    if not can_move_rows(backend):
        return SharedRoom(bundle, backend, sizes)
    if backend.rows > 1:
        return MovedRoom(bundle, backend, sizes)
    # Attention by panels reads the whole capacity; other graphs for one row read the filled slots.
    return (SharedRoom if bundle.panel is None else GrownRoom)(bundle, backend, sizes)


def _doubtful(rows: Sequence[int], error: BackendError) -> DoubtfulRowsError:
    return DoubtfulRowsError(f"A step failed halfway, which ends its {len(rows)} requests: {error}")

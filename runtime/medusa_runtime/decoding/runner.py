"""Steps of a batch: room in the caches, the tree that fits the load, and which request a failure belongs to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import BatchBackend, StepResult
from medusa_runtime.backends.shield import shielded
from medusa_runtime.bundles.bundle import GRAPH, WEIGHTS, Bundle
from medusa_runtime.decoding.latency import LatencyTable
from medusa_runtime.decoding.retry import retried
from medusa_runtime.decoding.tree_choice import TreeChoice, TreeSize
from medusa_runtime.errors import BackendError, DoubtfulRowsError

# On CPUs attention reads a byte of the caches in about twice the time in which matrix products read one of the weights.
CACHE_TO_WEIGHTS = 2
# Entries that are moved at a time while others wait: faster than a chunk of a prompt, even where memory is new.
MOVED_AT_ONCE = 512


class BatchRunner:
    """Runs steps of some rows.

    Args:
        bundle: What the backend runs.
        backend: It.
        tree_size: Nodes per row and step; ``auto`` takes what has the best expected speed for so many rows at a time.
    """

    def __init__(self, bundle: Bundle, backend: BatchBackend, tree_size: TreeSize) -> None:
        self.backend = shielded(backend)
        self._bundle = bundle
        self._tree_size = tree_size
        self._choice = TreeChoice(bundle.acceptance, bundle.tree, {})
        self._grouped: list[int] = []
        self._wanted: list[list[int]] = []
        self._groups: list[list[int]] = []
        self._worth_a_step = _slots_worth_a_step(bundle)

    def measure(self) -> None:
        """Finds out which tree is best for how many rows, so far as nobody has measured it on this machine before.

        Raises:
            BackendError: The graph failed, or there is no memory.
        """
        most = self.backend.rows
        if self._tree_size != "auto" or self._bundle.acceptance.hopeless:
            return
        counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < most]
        tables = {n: LatencyTable.measured_batch(self._bundle, self.backend, n) for n in [*counts, most]}
        self._choice = TreeChoice(self._bundle.acceptance, self._bundle.tree, tables)

    def tree_size(self, rows: Sequence[int], guessed: Collection[int] = ()) -> int:
        """Nodes per row in a step of these rows, of which some have a guess from the text."""
        return self._choice.size(rows, guessed) if self._tree_size == "auto" else self._tree_size

    def _most_nodes(self, rows: Sequence[int]) -> int:
        """Before it is known which of them have a guess."""
        return self._choice.outlook(rows) if self._tree_size == "auto" else self._tree_size

    @property
    def deepest_guess(self) -> int:
        """Tokens of a guess from the text that a tree may have room for."""
        largest = self._choice.largest if self._tree_size == "auto" else self._tree_size
        return min(largest - 1, self._bundle.tree.max_depth)

    @property
    def choice(self) -> TreeChoice:
        """What ``auto`` chooses by."""
        return self._choice

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """Which rows step together at present."""
        return self._groups

    def regroup(self, rows: Sequence[int]) -> None:
        """Decides which of the rows that decode should step together: those of like length.

        In a step attention reads as many slots of each row as the longest one has. Where that comes to more than
        reading the weights once more, long rows step by themselves. They do so, too, until ``gather`` has brought them
        together with others.
        """
        if self._grouped != list(rows):  # else they would move to and fro
            ascending = sorted(rows, key=lambda row: int(self.backend.lengths[row]))
            self._grouped, self._wanted = list(rows), self._split(ascending)
            stay = [[row for row in group if row in rows] for group in self._groups]
            new = [[row] for row in rows if not any(row in group for group in stay)]
            self._groups = [*filter(None, stay), *new]

    def gather(self) -> int:
        """Brings rows together that are to step together, bit by bit; gives the number of entries that were moved.

        Raises:
            BackendError: There is no memory.
        """
        moved = 0
        for group in self._wanted:
            if group in self._groups:
                continue
            here = self._move_towards(group, self._entries(group) + self._most_nodes(group))
            moved += MOVED_AT_ONCE if here is None else here
            if here is not None:
                rest = [[row for row in other if row not in group] for other in self._groups]
                self._groups = [*filter(None, rest), group]
        return moved

    def _split(self, ascending: Sequence[int]) -> list[list[int]]:
        lengths = [int(self.backend.lengths[row]) for row in ascending]
        spared = [count * (lengths[-1] - lengths[count - 1]) for count in range(1, len(lengths))]
        if not spared or max(spared) < self._worth_a_step:
            return [sorted(ascending)]
        count = 1 + spared.index(max(spared))
        return [*self._split(ascending[:count]), sorted(ascending[count:])]

    def prepare(self, rows: Sequence[int]) -> int:
        """Makes room for a decoding step of these rows; gives the number of entries that had to be moved.

        Raises:
            BackendError: There is no memory.
        """
        return self._arrange(rows, self._entries(rows) + self._most_nodes(rows))

    def prepare_prefill(self, row: int, chunk: Sequence[int], beside: Sequence[int]) -> int:
        """As ``prepare``, for ``prefill``; where others wait, about ``MOVED_AT_ONCE`` entries are moved at a time.

        Whoever gets that many calls it again: ``prefill`` would move all that is left.
        """
        needed = self._entries([row]) + self._chunk_size(row, chunk, beside)
        moved = self._move_towards([row], needed) if beside else self._arrange([row], needed)
        return MOVED_AT_ONCE if moved is None else moved

    def prefill(self, row: int, chunk: Sequence[int], beside: Sequence[int]) -> StepResult:
        """Takes in a chunk of a row's prompt; it will decode with the rows ``beside`` it once that is the last one.

        Raises:
            DoubtfulRowsError: The graph failed, and the row is no longer as it was.
            BackendError: The graph failed, or there is no memory; the row is as it was.
        """
        return self._step(self._chunk_size(row, chunk, beside), {row: chunk}, [row])

    def _chunk_size(self, row: int, chunk: Sequence[int], beside: Sequence[int]) -> int:
        """Padded, if need be, so that all heads draft that the tree has use for."""
        return max(len(chunk), min(self._bundle.drafting_size, self._most_nodes([*beside, row])))

    def decode(self, rows: Sequence[int], size: int, guesses: Mapping[int, Sequence[int]]) -> StepResult:
        """Verifies the trees of some rows, of the size that ``tree_size`` gave for them.

        Args:
            rows: The rows.
            size: Nodes per row.
            guesses: For rows that have a guess from the text, the next tokens.

        Raises:
            DoubtfulRowsError: As for ``prefill``.
            BackendError: As for ``prefill``.
        """
        for row, tokens in guesses.items():
            self._bundle.tree.insert(tokens, self.backend.drafts[row], size)
        result = self._step(size, {}, rows)
        emitted = {row: int(result.count[row]) for row in rows if result.count[row]}
        self._choice.observe(size, emitted, guesses)
        return result

    def retry(self, row: int, chunk: Sequence[int] = ()) -> StepResult:
        """Tries a step again that emitted nothing for a row: of its chunk alone, or a plain step.

        Raises:
            NotFiniteError: It emits nothing again.
            BackendError: As for ``prefill``.
        """
        size, prompts = (len(chunk), {row: chunk}) if chunk else (1, {})
        return retried(self.backend, row, self._bundle.dtype, lambda: self._step(size, prompts, [row]))

    def take_over(self, source: int, row: int, shared: int) -> None:
        """Begins a request in a row with the first entries of another one, or with what it has of them itself.

        Raises:
            BackendError: There is no memory.
        """
        self._choice.begin(row)
        if source != row:
            self.backend.reset(row)
            if shared:
                self._arrange([row], shared + 1)
        self.backend.copy(source, row, shared)

    def _step(self, size: int, prompts: Mapping[int, Sequence[int]], rows: Sequence[int]) -> StepResult:
        self._arrange(rows, self._entries(rows) + size)
        before = self._state(rows)
        try:
            return self.backend.step(size, prompts, rows)
        except BackendError as error:
            if not self._is_still(before, rows):
                raise DoubtfulRowsError(
                    f"A step failed halfway, which ends its {len(rows)} requests: {error}"
                ) from error
            raise

    def _state(self, rows: Sequence[int]) -> list[NDArray[np.int64]]:
        """A copy of what every step changes."""
        return [self.backend.lengths[list(rows)], self.backend.drafts[list(rows)]]

    def _is_still(self, before: Sequence[NDArray[np.int64]], rows: Sequence[int]) -> bool:
        """Whether rows are as they were before a step; not, if the backend can't even say."""
        try:
            return all(map(np.array_equal, before, self._state(rows)))
        except BackendError:
            return False

    def forget_groups(self) -> None:
        """Forgets which rows step together; ``regroup`` decides anew."""
        self._grouped, self._wanted, self._groups = [], [], []

    def _entries(self, rows: Sequence[int]) -> int:
        """Of the longest of these rows."""
        return int(self.backend.lengths[list(rows)].max())

    def _move_towards(self, rows: Sequence[int], entries: int) -> int | None:
        """As ``_arrange``, in parts: None as long as it takes more calls."""
        if not self.backend.approach(rows, self._bundle.tree.max_depth + entries, MOVED_AT_ONCE):
            return None
        return self._arrange(rows, entries)

    def _arrange(self, rows: Sequence[int], entries: int) -> int:
        try:
            return self.backend.arrange(rows, self._bundle.tree.max_depth + entries)
        except BackendError as error:
            if isinstance(error.__cause__, MemoryError):
                raise BackendError(f"There is no room for {entries} tokens in {len(rows)} rows.") from error
            raise


def _slots_worth_a_step(bundle: Bundle) -> int:
    """How many slots of a row's caches take as long to read as all the weights."""
    model = bundle.model
    slot = 2 * model.num_layers * model.num_key_value_heads * model.head_dim * np.dtype(bundle.dtype).itemsize
    weights = max((facts.size for name, facts in bundle.files.items() if name in (WEIGHTS, GRAPH)), default=0)
    return weights // (CACHE_TO_WEIGHTS * slot)

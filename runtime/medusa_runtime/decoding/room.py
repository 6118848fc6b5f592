"""Room in the caches: which rows step together, and the slots that their steps need.

There are two kinds of backends. Some move rows, so that those that step together are neighbours and others cost
nothing (``MovedRoom``). On all others each step runs over all rows (``SharedRoom``). The only row of a backend gets its
room at the start of a request (``SharedRoom``), or as it grows if attention reads free slots, too (``GrownRoom``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from medusa_runtime.backends.base import Backend, MovesRows, has_fixed_capacity
from medusa_runtime.bundles.bundle import GRAPH, WEIGHTS, Bundle
from medusa_runtime.decoding.tree_choice import TreeSizes
from medusa_runtime.errors import BackendError
from medusa_runtime.tuning import CACHE_TO_WEIGHTS, CAPACITY_STEP, MOVED_AT_ONCE


class Room(ABC):
    """Makes room for steps.

    Args:
        bundle: The bundle that the backend runs.
        backend: The backend.
        sizes: The tree sizes of steps.

    Attributes:
        groups: The rows that decode, as they step together at present.
        is_shared: True if each step runs over all rows, so that a row costs the same whether it takes part or not.
    """

    is_shared = False

    def __init__(self, bundle: Bundle, backend: Backend, sizes: TreeSizes) -> None:
        self.groups: list[list[int]] = []
        self._backend = backend
        self._sizes = sizes
        self._slots = bundle.slots

    def check(self, tokens: int, size: int) -> None:
        """Refuses a request that can't fit into the backend's caches. Any thread may call it at any time.

        Args:
            tokens: The most tokens of its prompt and answer.
            size: The most nodes that its steps verify.

        Raises:
            RequestError: The caches have a fixed capacity, and the request takes more slots.
        """
        if has_fixed_capacity(self._backend):
            self._backend.check_capacity(self._slots.sequence_capacity(tokens, size))

    def most_tokens(self, size: int) -> int | None:
        """The most tokens of prompt and answer that fit into the backend's caches; None if the caches grow.

        Args:
            size: The most nodes that a request's steps verify.
        """
        fixed = has_fixed_capacity(self._backend)
        return self._slots.longest_sequence(self._backend.capacity, size) if fixed else None

    @abstractmethod
    def admit(self, tokens: int) -> None:
        """Makes room for a whole request, if rows don't grow later.

        Args:
            tokens: The most tokens of its prompt and answer.

        Raises:
            BackendError: There is no room.
        """

    @abstractmethod
    def regroup(self, rows: Sequence[int]) -> None:
        """Decides which of the rows that decode step together.

        Raises:
            BackendError: The backend failed.
        """

    @abstractmethod
    def gather(self) -> int:
        """Brings rows together that are to step together; gives the number of entries that were moved.

        Raises:
            BackendError: There is no memory.
        """

    @abstractmethod
    def make(self, rows: Sequence[int], size: int) -> int:
        """Makes room for a step of ``size`` tokens over these rows; gives the number of entries that were moved.

        Raises:
            BackendError: There is no room.
        """

    @abstractmethod
    def make_for_copy(self, row: int, entries: int) -> None:
        """Makes room for entries that are copied to an empty row.

        Raises:
            BackendError: There is no room.
        """

    @abstractmethod
    def is_crowded(self, size: int) -> bool:
        """True if rows that don't take part have no room for a step of ``size`` tokens, which runs over them, too."""

    @abstractmethod
    def make_in_part(self, row: int, size: int) -> int:
        """Makes room for one row, like ``make``, but moves about ``MOVED_AT_ONCE`` entries at a time.

        If it gives that number, there is more to move: call it again before the step.
        """

    @abstractmethod
    def fitting(self, size: int) -> int:
        """The most tokens, up to ``size``, of a step that fits beside the rows that hold entries now."""

    def forget(self) -> None:
        """Forgets which rows step together. ``regroup`` decides again."""
        self.groups = []

    @abstractmethod
    def prepare(self, rows: Sequence[int]) -> int:
        """Moves rows for a decoding step whose tree size is not known yet; gives the number of moved entries.

        Raises:
            BackendError: There is no room.
        """

    def longest(self, rows: Sequence[int]) -> int:
        """The length of the longest of these rows."""
        return int(self._backend.lengths[list(rows)].max())


class SharedRoom(Room):
    """Room on a backend whose rows don't move: all have the same capacity, and each step runs over all of them."""

    is_shared = True

    def admit(self, tokens: int) -> None:
        # This is enough for the last chunk, too: it is padded to the largest tree at most.
        self._backend.reserve(self._slots.sequence_capacity(tokens, self._sizes.largest))

    def regroup(self, rows: Sequence[int]) -> None:
        self.groups = [list(rows)]

    def gather(self) -> int:
        return 0

    def prepare(self, rows: Sequence[int]) -> int:
        return 0  # nothing moves, and lengths are not asked for while a step is in flight

    def make(self, rows: Sequence[int], size: int) -> int:
        if self._backend.rows == 1:
            return 0  # ``admit`` has made room for all steps
        self._backend.reserve(self._slots.capacity(self.longest(range(self._backend.rows)), size))
        return 0

    def make_for_copy(self, row: int, entries: int) -> None:
        pass  # ``admit`` has made room for the whole request

    def is_crowded(self, size: int) -> bool:
        try:
            self.make([], size)
        except BackendError:
            return True
        return False

    def make_in_part(self, row: int, size: int) -> int:
        return self.make([row], size)

    def fitting(self, size: int) -> int:
        longest = self.longest(range(self._backend.rows))
        return max(1, min(size, self._backend.capacity - self._slots.capacity(longest)))


class GrownRoom(SharedRoom):
    """Room for the only row of a backend that moves rows: it grows with the row.

    It is for graphs in which attention reads all slots, the free ones included.
    """

    def __init__(self, bundle: Bundle, backend: MovesRows, sizes: TreeSizes) -> None:
        super().__init__(bundle, backend, sizes)
        self._mover = backend

    def admit(self, tokens: int) -> None:
        """Does nothing: the row is given room as it grows."""

    def make(self, rows: Sequence[int], size: int) -> int:
        needed, capacity = self._slots.capacity(int(self._backend.lengths[0]), size), self._backend.capacity
        if 0 <= capacity - needed <= capacity // 4 + CAPACITY_STEP:  # most steps: looking further would take time
            return 0
        return self._mover.arrange([0], needed)

    def is_crowded(self, size: int) -> bool:
        return False

    def fitting(self, size: int) -> int:
        return size


class MovedRoom(Room):
    """Room on a backend that moves rows: those of like length step together, in memory that fits them.

    In a step, attention reads as many slots of each row as the longest one has. Where that takes longer than reading
    the weights once more, long rows step by themselves. So do rows that ``gather`` has not brought together yet.
    """

    def __init__(self, bundle: Bundle, backend: MovesRows, sizes: TreeSizes) -> None:
        super().__init__(bundle, backend, sizes)
        self._mover = backend
        self._grouped: list[int] = []
        self._wanted: list[list[int]] = []
        self.worth_a_step = _slots_worth_a_step(bundle)

    def admit(self, tokens: int) -> None:
        """Does nothing: rows are given room as they grow."""

    def regroup(self, rows: Sequence[int]) -> None:
        if self._grouped != list(rows):  # otherwise rows would move with every change of length
            ascending = sorted(rows, key=lambda row: int(self._backend.lengths[row]))
            self._grouped, self._wanted = list(rows), self._split(ascending)
            stay = [[row for row in group if row in rows] for group in self.groups]
            new = [[row] for row in rows if not any(row in group for group in stay)]
            self.groups = [*filter(None, stay), *new]

    def gather(self) -> int:
        moved = 0
        for group in self._wanted:
            if group in self.groups:
                continue
            here = self._move_in_part(group, self.longest(group) + self._sizes.outlook(group))
            moved += MOVED_AT_ONCE if here is None else here
            if here is not None:
                rest = [[row for row in other if row not in group] for other in self.groups]
                self.groups = [*filter(None, rest), group]
        return moved

    def _split(self, ascending: Sequence[int]) -> list[list[int]]:
        """Rows by ascending length, as they are to step together."""
        lengths = [int(self._backend.lengths[row]) for row in ascending]
        spared = [count * (lengths[-1] - lengths[count - 1]) for count in range(1, len(lengths))]
        if not spared or max(spared) < self.worth_a_step:
            return [sorted(ascending)]
        count = 1 + spared.index(max(spared))
        return [*self._split(ascending[:count]), sorted(ascending[count:])]

    def prepare(self, rows: Sequence[int]) -> int:
        return self.make(rows, self._sizes.outlook(rows))

    def make(self, rows: Sequence[int], size: int) -> int:
        return self._arrange(rows, self.longest(rows) + size)

    def make_for_copy(self, row: int, entries: int) -> None:
        self._arrange([row], entries + 1)

    def is_crowded(self, size: int) -> bool:
        return False

    def make_in_part(self, row: int, size: int) -> int:
        moved = self._move_in_part([row], self.longest([row]) + size)
        return MOVED_AT_ONCE if moved is None else moved

    def fitting(self, size: int) -> int:
        return size

    def forget(self) -> None:
        super().forget()
        self._grouped, self._wanted = [], []

    def _move_in_part(self, rows: Sequence[int], entries: int) -> int | None:
        """Arranges rows in parts, like ``_arrange``. Returns None if more calls are needed."""
        if not self._mover.prepare_arrange(rows, self._slots.capacity(entries), MOVED_AT_ONCE):
            return None
        return self._arrange(rows, entries)

    def _arrange(self, rows: Sequence[int], entries: int) -> int:
        """Brings rows together with room for ``entries`` each; gives the number of entries that were moved."""
        try:
            return self._mover.arrange(rows, self._slots.capacity(entries))
        except BackendError as error:
            if isinstance(error.__cause__, MemoryError):
                raise BackendError(f"There is no room for {entries} tokens in {len(rows)} rows.") from error
            raise


def _slots_worth_a_step(bundle: Bundle) -> int:
    """The number of slots of a row's caches that take as long to read as all the weights."""
    weights = max((facts.size for name, facts in bundle.files.items() if name in (WEIGHTS, GRAPH)), default=0)
    # 8-bit integers are cast first, and take as long as the fp32 numbers that they become.
    entry = bundle.entry_bytes if bundle.kv_cache is None else 4 * sum(state.entry_size for state in bundle.states)
    return weights // (CACHE_TO_WEIGHTS * entry)

"""Who runs next: a bounded queue in front of a fixed number of rows.

Pure bookkeeping, without threads, clocks or a backend, so that its laws can be tested by themselves:

- a request waits, runs in one row, or is gone; a row runs one request at most;
- nobody waits while a row is free;
- of those that wait, the one with the highest priority goes first, then the one that came first;
- of rows that prefill, those take turns that have the highest priority.

A row that nobody uses keeps the entries of its last request: the next one takes over what both begin with. Where
another row has more in common with a new request, its entries are copied.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.decoding.sequence import TokenSequence
from medusa_runtime.errors import QueueFullError
from medusa_runtime.handle import RequestHandle

# A copy of fewer entries than this is not worth its while.
SHORTEST_COPY = 16


@dataclass(eq=False)
class Job:
    """A request and its place in the service.

    Attributes:
        sequence: Its tokens.
        handle: Its outside.
        priority: Higher goes first.
        submitted: When it came, in seconds of the service's clock.
        deadline: When its time is up; None if it has all the time in the world.
        admitted: When it got its row.
        first_token: When its first token came.
        row: The row that it runs in, if it does.
    """

    sequence: TokenSequence
    handle: RequestHandle
    priority: int = 0
    submitted: float = 0.0
    deadline: float | None = None
    admitted: float = 0.0
    first_token: float = 0.0
    row: int | None = None
    turn: int = field(default=0, repr=False)


@dataclass(frozen=True)
class Admission:
    """A request gets a row.

    Attributes:
        job: The request, its ``row`` set.
        source: The row whose first entries it takes over; its own or another one.
        shared: How many.
    """

    job: Job
    source: int
    shared: int


class Scheduler:
    """The queue and the rows.

    Args:
        rows: How many requests run at a time.
        max_queue: How many may wait besides.
    """

    def __init__(self, rows: int, max_queue: int) -> None:
        self.max_queue = max_queue
        self.running: dict[int, Job] = {}
        self.waiting: list[Job] = []  # in the order in which they go
        self._held: list[Sequence[int]] = [()] * rows  # the tokens whose entries a free row still has
        self._freed: list[int] = [0] * rows  # when each became free
        self._turns = itertools.count(1)

    @property
    def rows(self) -> int:
        """How many requests run at a time."""
        return len(self._held)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    def add(self, job: Job) -> None:
        """Queues a request.

        Raises:
            QueueFullError: There is no room.
        """
        if len(self.waiting) >= self.max_queue + self.rows - len(self.running):
            raise QueueFullError(
                f"{len(self.running)} requests are running and {len(self.waiting)} are waiting, as many as this "
                "service takes: try again later, or raise max_queue."
            )
        job.turn = next(self._turns)
        bisect.insort(self.waiting, job, key=lambda other: (-other.priority, other.turn))

    def admit(self, lengths: Sequence[int] | NDArray[np.int64]) -> Iterator[Admission]:
        """Gives free rows to those that wait.

        Args:
            lengths: Committed entries per row, as they are at each moment: an admission has to be carried out
                before the next one is asked for.
        """
        while self.waiting and len(self.running) < self.rows:
            job = self.waiting[0]
            row, source, shared = self._place(job, lengths)
            del self.waiting[0]
            job.row, job.turn = row, next(self._turns)
            self.running[row] = job
            self._held[row] = ()
            job.sequence.prefilled = job.sequence.stats.cached_tokens = shared
            yield Admission(job, source, shared)

    def _place(self, job: Job, lengths: Sequence[int] | NDArray[np.int64]) -> tuple[int, int, int]:
        """The row for a request, the row that has most in common with it, and how many entries that is."""
        prompt = job.sequence.prompt_ids
        # The last token is always computed: what follows it is what we want to know.
        shared = [
            _common(prompt[:-1], self._tokens(row)[: lengths[row]] if lengths[row] else ()) for row in range(self.rows)
        ]
        free = [row for row in range(self.rows) if row not in self.running]
        source = max(range(self.rows), key=lambda row: (shared[row], row in free))
        if source in free and shared[source] and shared[source] == len(self._held[source]):
            return source, source, shared[source]  # it goes on where another, or its own session, ended
        # The one free for longest, empty ones first; another one than the source, if there is.
        row = min(free, key=lambda row: (row == source and shared[row] > 0, bool(self._held[row]), self._freed[row]))
        if row != source and shared[source] >= shared[row] + SHORTEST_COPY:
            return row, source, shared[source]
        return row, row, shared[row]

    def _tokens(self, row: int) -> Sequence[int]:
        job = self.running.get(row)
        return self._held[row] if job is None else [*job.sequence.prompt_ids, *job.sequence.token_ids]

    def prefilling(self) -> Job | None:
        """Whose prompt is to go on next."""
        jobs = [job for job in self.running.values() if job.sequence.is_prefilling]
        if not jobs:
            return None
        job = min(jobs, key=lambda job: (-job.priority, job.turn))
        job.turn = next(self._turns)
        return job

    def decoding(self) -> list[Job]:
        """All that have their prompt behind them, by row."""
        return [self.running[row] for row in sorted(self.running) if not self.running[row].sequence.is_prefilling]

    def remove(self, job: Job, length: int = 0) -> None:
        """Takes a request out of its row or of the queue.

        Args:
            job: The request.
            length: Entries of its row that hold good.
        """
        if job.row is None:
            self.waiting.remove(job)
            return
        self._held[job.row] = self._tokens(job.row)[:length]
        self._freed[job.row] = next(self._turns)
        del self.running[job.row]
        job.row = None

    def forget(self) -> list[int]:
        """Gives up what free rows hold, and says which did."""
        rows = [row for row, held in enumerate(self._held) if held]
        for row in rows:
            self._held[row] = ()
        return rows


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))

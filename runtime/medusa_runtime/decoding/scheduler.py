"""The scheduler: a bounded queue in front of a fixed number of rows.

It is bookkeeping only, without threads, clocks or a backend, so that its laws can be tested alone:

- a request waits, runs in one row, or is gone; a row runs one request at most;
- no request waits while a row is free;
- of the requests that wait, the one with the highest priority goes first, then the oldest;
- of the rows that prefill, those with the highest priority take turns.

A free row keeps the entries of its last request. The next request in that row keeps the entries of the tokens that
both begin with. If another row shares more tokens with a new request, its entries are copied. Long and short requests
share no entries, as their rotary frequencies differ.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.decoding.sequence import TokenSequence
from medusa_runtime.errors import MedusaError, QueueFullError
from medusa_runtime.request import Chunk, GenerationResult
from medusa_runtime.tuning import SHORTEST_COPY


class Receiver(Protocol):
    """Receives the chunks of a request, then its end."""

    @property
    def done(self) -> bool:
        """True once the request has ended."""
        ...

    def put(self, chunk: Chunk) -> None:
        """Receives the next chunk."""
        ...

    def wake(self) -> None:
        """Wakes the readers of new chunks. ``end`` wakes them, too."""
        ...

    def end(self, outcome: GenerationResult | MedusaError) -> None:
        """Receives the end: the complete answer, or the error that ended the request."""
        ...


@dataclass(eq=False)
class Job:
    """A request in a decode loop.

    Times are seconds of the loop's clock.

    Attributes:
        sequence: The request's tokens.
        receiver: Receives its chunks and its end.
        priority: Requests with a higher priority go first.
        submitted: Time of submission.
        deadline: Time at which it ends with ``DeadlineError``; None for no limit.
        admitted: Time at which it got a row.
        first_token: Time of its first token.
        row: Its row while it runs, else None.
        turn: Its place in the order of submissions, and later in the order of prefill turns.
    """

    sequence: TokenSequence
    receiver: Receiver
    priority: int = 0
    submitted: float = 0.0
    deadline: float | None = None
    admitted: float = 0.0
    first_token: float = 0.0
    row: int | None = None
    turn: int = field(default=0, repr=False)


@dataclass(frozen=True)
class Admission:
    """A request that gets a row.

    Attributes:
        job: The request, with its ``row`` set.
        source: The row whose first entries it reuses: its own row or another one.
        shared: Number of these entries.
    """

    job: Job
    source: int
    shared: int


class Scheduler:
    """The queue and the rows.

    Args:
        rows: Number of requests that run at a time.
        max_queue: Number of requests that may wait besides.
        copies: True if entries can be copied from row to row; else a request reuses those of its own row only.

    Attributes:
        running: Requests that run, by row.
        waiting: Requests that wait, the next one first.
    """

    def __init__(self, rows: int, max_queue: int, *, copies: bool = True) -> None:
        self.max_queue = max_queue
        self._copies = copies
        self.running: dict[int, Job] = {}
        self.waiting: list[Job] = []
        self._held: list[Sequence[int]] = [()] * rows  # tokens whose entries a free row still has
        self._is_long: list[bool] = [False] * rows  # whether a row's entries are those of a long request
        self._freed: list[int] = [0] * rows  # when each row became free
        self._turns = itertools.count(1)

    @property
    def rows(self) -> int:
        """Number of requests that run at a time."""
        return len(self._held)

    @property
    def is_idle(self) -> bool:
        """True if no request runs or waits."""
        return not self.running and not self.waiting

    def add(self, job: Job) -> None:
        """Queues a request.

        Raises:
            QueueFullError: The queue is full.
        """
        if len(self.waiting) >= self.max_queue + self.rows - len(self.running):
            raise QueueFullError(
                f"{len(self.running)} requests are running and {len(self.waiting)} are waiting, as many as this "
                "service takes: try again later, or raise max_queue."
            )
        job.turn = next(self._turns)
        bisect.insort(self.waiting, job, key=lambda other: (-other.priority, other.turn))

    def admit(self, lengths: Sequence[int] | NDArray[np.int64]) -> Iterator[Admission]:
        """Gives free rows to requests that wait.

        Carry out each admission before you ask for the next one.

        Args:
            lengths: Reusable entries per row, [rows]. It is read again for each admission.
        """
        while self.waiting and len(self.running) < self.rows:
            job = self.waiting[0]
            row, source, shared = self._place(job, lengths)
            del self.waiting[0]
            job.row, job.turn = row, next(self._turns)
            self.running[row] = job
            self._held[row], self._is_long[row] = (), job.sequence.is_long
            job.sequence.prefilled = job.sequence.stats.cached_tokens = shared
            yield Admission(job, source, shared)

    def _place(self, job: Job, lengths: Sequence[int] | NDArray[np.int64]) -> tuple[int, int, int]:
        """The row for a request, the row that shares most tokens with it, and their number."""
        prompt = job.sequence.prompt_ids
        # The last token of a prompt is always computed, as the first token of the answer follows from it.
        shared = [
            _common(prompt[:-1], self._tokens(row)[: lengths[row]])
            if lengths[row] and self._is_long[row] == job.sequence.is_long
            else 0
            for row in range(self.rows)
        ]
        free = [row for row in range(self.rows) if row not in self.running]
        source = max(range(self.rows) if self._copies else free, key=lambda row: (shared[row], row in free))
        continues = shared[source] and shared[source] == len(self._held[source])
        if source in free and (continues or (not self._copies and shared[source] >= SHORTEST_COPY)):
            return source, source, shared[source]
        # The row that has been free for longest, empty rows first; not the source, if another one is free.
        row = min(free, key=lambda row: (row == source and shared[row] > 0, bool(self._held[row]), self._freed[row]))
        if row != source and shared[source] >= shared[row] + SHORTEST_COPY:
            return row, source, shared[source]
        return row, row, shared[row]

    def _tokens(self, row: int) -> Sequence[int]:
        job = self.running.get(row)
        return self._held[row] if job is None else [*job.sequence.prompt_ids, *job.sequence.token_ids]

    def prefilling(self) -> Job | None:
        """The request whose prompt continues next; None if no request prefills."""
        jobs = [job for job in self.running.values() if job.sequence.is_prefilling]
        if not jobs:
            return None
        job = min(jobs, key=lambda job: (-job.priority, job.turn))
        job.turn = next(self._turns)
        return job

    def all_prefilling(self) -> list[Job]:
        """The requests whose prompt is not complete, by row."""
        return [self.running[row] for row in sorted(self.running) if self.running[row].sequence.is_prefilling]

    def decoding(self) -> list[Job]:
        """The requests whose prompt is complete, by row."""
        return [self.running[row] for row in sorted(self.running) if not self.running[row].sequence.is_prefilling]

    def remove(self, job: Job, length: int = 0) -> None:
        """Removes a request from its row or from the queue.

        Args:
            job: The request.
            length: Number of entries that its row keeps.
        """
        if job.row is None:
            self.waiting.remove(job)
            return
        self._held[job.row] = self._tokens(job.row)[:length]
        self._freed[job.row] = next(self._turns)
        del self.running[job.row]
        job.row = None

    def evict(self) -> list[int]:
        """Gives up the entries of free rows.

        Returns:
            The rows that had any.
        """
        rows = [row for row, held in enumerate(self._held) if held]
        for row in rows:
            self._held[row] = ()
        return rows


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of equal tokens at the beginning of both."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))

"""Ends requests of a decode loop, and frees their rows."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence

from medusa_runtime.backends.base import Backend
from medusa_runtime.decoding.ownership import Ownership
from medusa_runtime.decoding.runner import StepRunner
from medusa_runtime.decoding.scheduler import Job, Scheduler
from medusa_runtime.errors import BackendError, DeviceLostError, DoubtfulRowsError, MedusaError
from medusa_runtime.metrics import Metrics, call_hook
from medusa_runtime.request import GenerationResult

_log = logging.getLogger(__name__)


class Endings:
    """The requests that run and wait, and how they end; the base of ``DecodeLoop``.

    Args:
        runner: Runs the steps.
        scheduler: The queue and the rows.
        backend: The backend.
        metrics: Hooks that are called for ends.

    Attributes:
        scheduler: The queue and the rows. ``changed`` guards it.
        changed: Is notified when a request has ended.
        backend: The backend, which raises errors of this project only.
        metrics: Hooks that are called for steps and ends.
        reset_error: The error of the last attempt to empty a row; None if it worked.
    """

    def __init__(self, runner: StepRunner, scheduler: Scheduler, backend: Backend, metrics: Metrics) -> None:
        self.scheduler = scheduler
        self.changed = threading.Condition()
        self.backend = runner.backend
        self.metrics = metrics
        self.reset_error: BackendError | None = None
        self._in_flight = runner.in_flight
        self._room = runner.room
        self._ownership = Ownership(backend)

    @contextlib.contextmanager
    def _blamed_on(self, job: Job) -> Iterator[None]:
        """Ends a request with the backend's error.

        Raises:
            DeviceLostError: No other request can be answered, either.
        """
        try:
            yield
        except DoubtfulRowsError as error:
            self._end_doubtful([job], error)
        except BackendError as error:
            if not job.receiver.done:
                self.end(job, error)
            if isinstance(error, DeviceLostError):
                raise

    def _end_doubtful(self, jobs: Sequence[Job], error: DoubtfulRowsError) -> None:
        """Ends the requests of a step that may have changed its rows."""
        with self.changed:
            for job in [*self.scheduler.running.values()] if self._room.is_shared else jobs:
                if not job.receiver.done:
                    self.end(job, error)

    def end(self, job: Job, outcome: GenerationResult | MedusaError) -> None:
        """Ends a request and frees its row. The row keeps its entries for later requests, unless the backend failed."""
        with self.changed:
            row = job.row
            kept = 0 if row is None or isinstance(outcome, BackendError) else self._kept(job, row)
            self.scheduler.remove(job, kept)
            if row is not None and not kept:
                self._reset(row)
            result = outcome if isinstance(outcome, GenerationResult) else None
            call_hook(
                self.metrics.ended, result.finish_reason if result else type(outcome).__name__, job.sequence.stats
            )
            job.receiver.end(outcome)
            self.changed.notify_all()

    def end_all(self, error: MedusaError) -> None:
        """Ends all requests with an error."""
        with self.changed:
            for job in [*self.scheduler.running.values(), *self.scheduler.waiting]:
                self.end(job, error)

    def recover(self, error: Exception) -> None:
        """Ends all running requests after a failure that none of them caused, and empties all rows.

        Raises:
            Exception: The failure, if no request runs or waits.
        """
        with self.changed:
            jobs = [*self.scheduler.running.values()] or self.scheduler.waiting[:1]
            if not jobs:
                raise error
            for job in jobs:
                failure: BackendError = BackendError(f"Decoding failed and has ended what was running: {error!r}.")
                failure.__cause__ = error
                self.end(job, error if isinstance(error, DeviceLostError) else failure)
            self.scheduler.evict()
            for row in range(self.scheduler.rows):
                self._reset(row)
            self._room.forget()

    def evict(self) -> None:
        """Gives up the entries of free rows, which may take the room that is needed."""
        with self.changed:
            for row in self.scheduler.evict():
                self._reset(row)

    def _kept(self, job: Job, row: int) -> int:
        """Entries that a row keeps when its request ends; 0 if the backend can't say."""
        if self._in_flight:
            self._in_flight.discard()
            # The length is not known before the step in flight has ended, but these tokens are in the cache.
            return len(job.sequence.prompt_ids) + len(job.sequence.token_ids) - 1
        try:
            length = int(self.backend.lengths[row])
        except BackendError:
            _log.exception("The length of row %d is not available", row)
            return 0
        self._ownership.leave(row, length)
        return length

    def _reset(self, row: int) -> None:
        """Empties a row. If that fails, it is tried again before the next request gets the row."""
        if self._in_flight:
            self._in_flight.discard()
        self._ownership.leave(row, 0)
        try:
            self.backend.reset(row)
            self.reset_error = None
        except BackendError as error:
            self.reset_error = error
            _log.exception("Row %d could not be reset", row)

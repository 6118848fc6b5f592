"""One turn of a service: which requests run, a chunk of one prompt, and the trees of those that decode.

What fails ends the requests whose fault it is, and nothing else:

1. A call for one request (taking over a prefix, assigning its draws, its prompt's chunks) ends that request.
2. A step of several requests is tried again for each alone, which shows whose fault it is. Where rows are no longer as
   they were before it, they can't be tried again: all requests of that step end.
3. Moves of rows are left out; the steps themselves say if there is no room.
4. Anything else is for the caller to ``recover`` from: all that run end, and all rows are emptied. Where nothing runs,
   the first that waits ends, so that the same failure can't come again and again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

from medusa_runtime.backends.base import BatchBackend, StepResult
from medusa_runtime.decoding.runner import BatchRunner
from medusa_runtime.decoding.scheduler import Job, Scheduler
from medusa_runtime.errors import BackendError, DoubtfulRowsError, MedusaError, RequestError
from medusa_runtime.metrics import Metrics, tell
from medusa_runtime.request import GenerationResult

LONE_CHUNK = 512  # tokens of a prompt that one step takes in while no row decodes
# Entries that may be moved in the same turn as a chunk is taken in, less than are moved at once: moving one takes a
# hundredth of computing one, or a tenth where memory is new.
MOVED_BESIDES = 64

_log = logging.getLogger(__name__)


class ServiceTurns:
    """Takes turns; all methods are for the service's own thread.

    Args:
        runner: Runs steps.
        scheduler: The queue and the rows, guarded by ``changed``.
        changed: Told when a request has ended. Who calls ``admit``, ``end`` or ``recover`` holds it.
        prefill_chunk: Tokens of a prompt that one step takes in while other requests decode.
        metrics: What to tell about it all.
        clock: Tells seconds, and never goes back.
    """

    def __init__(
        self,
        runner: BatchRunner,
        scheduler: Scheduler,
        changed: threading.Condition,
        *,
        prefill_chunk: int,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.changed = changed
        self.prefill_chunk = prefill_chunk
        self._backend: BatchBackend = runner.backend
        self._metrics = metrics
        self._clock = clock

    def admit(self) -> None:
        """Gives free rows to requests that wait."""
        if not self.scheduler.waiting:
            return
        try:
            lengths = self._backend.lengths
        except BackendError as error:
            if not self.scheduler.running:  # else it is tried again after their next step
                self.end(self.scheduler.waiting[0], error)
            return
        for admission in self.scheduler.admit(lengths):
            job, row = admission.job, admission.job.row
            assert row is not None
            job.admitted = self._clock()
            job.sequence.stats.queue_seconds = job.admitted - job.submitted
            with self._blamed_on(job):
                self.runner.take_over(admission.source, row, admission.shared)
                self._backend.assign(row, job.sequence.draws)

    def take(self) -> None:
        """One step of everybody: a chunk of one prompt, and the trees of those that decode."""
        groups, moved = self._arranged()
        if moved <= MOVED_BESIDES:
            self._prefill([job.row for jobs in groups for job in jobs if job.row is not None])
        for jobs in groups:
            self._decode(jobs)

    def _arranged(self) -> tuple[list[list[Job]], int]:
        """The requests that decode, as they step together, with room for that; and how many entries were moved."""
        with self.changed:
            jobs = {job.row: job for job in self.scheduler.decoding() if job.row is not None}
        if not jobs:
            return [], 0
        moved = 0
        try:
            self.runner.regroup(list(jobs))
        except BackendError:
            return [[job] for job in jobs.values()], 0  # the steps themselves will say so
        with contextlib.suppress(BackendError):  # they go on as they are
            moved += self.runner.gather()
        for rows in self.runner.groups:
            with contextlib.suppress(BackendError):  # the step itself will say so
                moved += self.runner.prepare(rows)
        return [[jobs[row] for row in rows] for rows in self.runner.groups], moved

    def _prefill(self, decoding: Sequence[int]) -> None:
        """Takes in one chunk of one prompt, beside rows that decode."""
        with self.changed:
            job = self.scheduler.prefilling()
        if job is None or job.row is None:
            return
        chunk = job.sequence.next_chunk(self.prefill_chunk if decoding else LONE_CHUNK)
        with self._blamed_on(job):
            try:
                moved = self.runner.prepare_prefill(job.row, chunk, decoding)
            except BackendError:
                self._forget_free_rows()
                moved = self.runner.prepare_prefill(job.row, chunk, decoding)
            if moved > MOVED_BESIDES and decoding:
                return  # moving them takes its time: the others first
            with self._timed("prefill", 1, len(chunk)) as tokens:
                result = self.runner.prefill(job.row, chunk, decoding)
                if not result.count[job.row]:
                    result = self.runner.retry(job.row, chunk)
                job.sequence.prefilled += len(chunk)
                tokens.append(len(chunk))
            if not job.sequence.is_prefilling:
                job.first_token = self._clock()
                job.sequence.stats.prefill_seconds = job.first_token - job.admitted
                self._deliver(job, *result.emitted(job.row))

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Verifies the trees of some rows; if that fails, of each by itself, to see whose fault it is."""
        try:
            self._decode_together(jobs)
        except DoubtfulRowsError as error:
            with self.changed:
                for job in jobs:
                    self.end(job, error)
        except BackendError:
            _log.warning("A step of %d requests failed: trying each by itself", len(jobs), exc_info=True)
            self._forget_free_rows()
            for job in jobs:
                with self._blamed_on(job):
                    self._decode_together([job])

    def _decode_together(self, jobs: Sequence[Job]) -> None:
        rows = _rows(jobs)
        deepest = self.runner.deepest_guess
        guesses = {row: guess for job, row in zip(jobs, rows, strict=True) if (guess := job.sequence.guess(deepest))}
        size = self.runner.tree_size(rows, guesses)
        with self._timed("decode", len(rows), size) as tokens:
            result = self.runner.decode(rows, size, guesses)
            silent = [job for job, row in zip(jobs, rows, strict=True) if not result.count[row]]
            for job in jobs:
                if job not in silent:
                    tokens.append(self._deliver_step(job, result, size))
        for job in silent:
            with self._blamed_on(job), self._timed("decode", 1, 1) as tokens:
                tokens.append(self._deliver_step(job, self.runner.retry(_rows([job])[0]), 1))

    def _deliver_step(self, job: Job, result: StepResult, size: int) -> int:
        """Delivers what a decoding step of ``size`` nodes emitted for a request; gives the number of tokens."""
        assert job.row is not None
        emitted, logprobs = result.emitted(job.row)
        stats = job.sequence.stats
        stats.count_step(len(emitted), size)
        stats.decode_seconds = self._clock() - job.first_token
        self._deliver(job, emitted, logprobs)
        return len(emitted)

    def _forget_free_rows(self) -> None:
        """Gives up what free rows hold, which may be what there is no room for."""
        with self.changed:
            for row in self.scheduler.forget():
                self._reset(row)

    @contextlib.contextmanager
    def _blamed_on(self, job: Job) -> Iterator[None]:
        """Ends a request with the backend's error."""
        try:
            yield
        except BackendError as error:
            with self.changed:
                if not job.handle.done:
                    self.end(job, error)

    @contextlib.contextmanager
    def _timed(self, kind: str, rows: int, size: int) -> Iterator[list[int]]:
        """Tells of a step that didn't fail; takes what it came to."""
        tokens: list[int] = []
        started = self._clock()
        yield tokens
        tell(self._metrics.step, kind, rows, size, sum(tokens), self._clock() - started)

    def _deliver(self, job: Job, emitted: Sequence[int], logprobs: Sequence[float] | None) -> None:
        try:
            chunk = job.sequence.accept(emitted, logprobs)
        except Exception as error:  # noqa: BLE001  # a tokenizer that fails is the fault of nobody else
            failure = RequestError(f"The tokens of this request can't be made text: {error!r}.")
            failure.__cause__ = error
            with self.changed:
                self.end(job, failure)
            return
        job.handle.put(chunk)
        if job.sequence.finish_reason is not None:
            with self.changed:
                self.end(job, job.sequence.result())

    def end(self, job: Job, outcome: GenerationResult | MedusaError) -> None:
        """Ends a request and frees its row, whose entries stay for others to take over unless the backend failed."""
        row = job.row
        kept = 0 if row is None or isinstance(outcome, BackendError) else self._length(row)
        self.scheduler.remove(job, kept)
        if row is not None and not kept:
            self._reset(row)
        result = outcome if isinstance(outcome, GenerationResult) else None
        tell(self._metrics.ended, result.finish_reason if result else type(outcome).__name__, job.sequence.stats)
        job.handle.end(outcome)
        self.changed.notify_all()

    def _length(self, row: int) -> int:
        """Entries of a row that hold good; none if the backend can't say."""
        try:
            return int(self._backend.lengths[row])
        except BackendError:
            _log.exception("The length of row %d is not to be had", row)
            return 0

    def _reset(self, row: int) -> None:
        """Empties a row; if that fails, it is tried again before the next request gets the row."""
        try:
            self._backend.reset(row)
        except BackendError:
            _log.exception("Row %d could not be reset", row)

    def recover(self, error: Exception) -> None:
        """Ends what runs after a failure that is nobody's fault, and empties all rows.

        Raises:
            Exception: The failure, if there is nothing to end.
        """
        jobs = [*self.scheduler.running.values()] or self.scheduler.waiting[:1]
        if not jobs:
            raise error
        for job in jobs:
            failure = BackendError(f"The service failed and has ended what was running: {error!r}.")
            failure.__cause__ = error
            self.end(job, failure)
        self.scheduler.forget()
        for row in range(self.scheduler.rows):
            self._reset(row)
        self.runner.forget_groups()


def _rows(jobs: Sequence[Job]) -> list[int]:
    return [job.row for job in jobs if job.row is not None]

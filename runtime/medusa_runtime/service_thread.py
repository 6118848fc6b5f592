"""The thread that owns a service's backend: it runs the steps of all requests.

What fails ends the requests whose fault it is, and nothing else:

1. A call for one request (taking over a prefix, assigning its draws, its prompt's chunks) ends that request.
2. A step of several requests is tried again for each alone, which shows whose fault it is. Where rows are no longer as
   they were before it, they can't be tried again: all requests of that step end.
3. Moves of rows are left out; the steps themselves say if there is no room.
4. Anything else ends all that run, and all rows are emptied. Where nothing runs, the first that waits ends, so that
   the same failure can't come again and again. Where nothing waits either, the service has failed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

from medusa_runtime.backends.base import BatchBackend, StepResult
from medusa_runtime.batch_runner import BatchRunner, DoubtfulRowsError
from medusa_runtime.closing import State
from medusa_runtime.errors import BackendError, DeadlineError, MedusaError, RequestError, ServiceClosedError
from medusa_runtime.metrics import Metrics, tell
from medusa_runtime.request import GenerationResult
from medusa_runtime.scheduler import Job, Scheduler

LONE_CHUNK = 512  # tokens of a prompt that one step takes in while no row decodes
# Entries that may be moved in the same turn as a chunk is taken in, less than are moved at once: moving one takes a
# hundredth of computing one, or a tenth where memory is new.
MOVED_BESIDES = 64

_log = logging.getLogger(__name__)


class ServiceThread:
    """Runs what is queued until it is closed. Other threads may call all public methods.

    Args:
        runner: Runs steps.
        scheduler: The queue and the rows, empty.
        prefill_chunk: Tokens of a prompt that one step takes in while other requests decode.
        metrics: What to tell about it all.
        clock: Tells seconds, and never goes back.
    """

    def __init__(
        self,
        runner: BatchRunner,
        scheduler: Scheduler,
        *,
        prefill_chunk: int,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.failure: Exception | None = None
        self._backend: BatchBackend = runner.backend
        self._prefill_chunk = prefill_chunk
        self._metrics = metrics
        self._clock = clock
        # Requests that somebody wants to end, and with what. Takes no lock, since a garbage collector may put it there.
        self._ends: SimpleQueue[tuple[Job, MedusaError]] = SimpleQueue()
        self._started: Future[None] = Future()
        self.changed = threading.Condition()  # guards all below, and the scheduler
        self._accepting = True
        self._closing = False
        self._has_ended = False
        self.thread = threading.Thread(target=self._run, name="medusa-service", daemon=True)

    # What callers' threads do.

    def start(self) -> None:
        """Starts the thread and waits until it has measured steps, before anybody has work for these cores.

        Raises:
            BackendError: The graph failed, or no thread can be started. The backend is closed.
        """
        try:
            self.thread.start()
        except RuntimeError as error:
            self._backend.close()
            raise BackendError(f"The service's thread can't be started: {error}. End other threads.") from error
        try:
            self._started.result()
        except BaseException:
            self.close()
            raise

    @property
    def state(self) -> State:
        """``ready``; ``draining``: it takes no more; ``closed``; ``failed``: the thread has died by itself."""
        if self.failure is not None:
            return "failed"
        if self._closing:
            return "closed"
        return "ready" if self._accepting else "draining"

    @property
    def load_figures(self) -> tuple[int, int]:
        """How many requests wait, and how many run."""
        with self.changed:
            return len(self.scheduler.waiting), len(self.scheduler.running)

    def add(self, job: Job) -> None:
        """Queues a request.

        Raises:
            QueueFullError: There is no room.
            ServiceClosedError: It takes no more requests.
        """
        with self.changed:
            if self.failure is not None:
                raise ServiceClosedError(f"This service has failed: {self.failure!r}. Load another.") from self.failure
            if not self._accepting:
                raise ServiceClosedError("This service takes no more requests: it is closed, or is about to be.")
            self.scheduler.add(job)
            self.changed.notify_all()

    def request_end(self, job: Job, error: MedusaError) -> None:
        """Has a request ended before its next step; takes no lock."""
        self._ends.put((job, error))  # nobody is told: the thread sleeps only where there is nothing to end

    def drain(self, timeout: float | None) -> bool:
        """As ``MedusaService.drain``."""
        self.check_thread()
        with self.changed:
            self._accepting = False
            return self.changed.wait_for(lambda: self.scheduler.is_idle or self._has_ended, timeout)

    def close(self) -> None:
        """As ``MedusaService.close``."""
        with self.changed:
            self._accepting = False
            self._closing = True
            self.changed.notify_all()
        if self.thread.ident is not None and threading.current_thread() is not self.thread:  # as a hook may be
            self.thread.join()

    def check_thread(self) -> None:
        """Raises ``RequestError`` in this thread, which a hook for metrics may have wait for itself."""
        if threading.current_thread() is self.thread:
            raise RequestError("A hook for metrics can't wait for its own service: do this in another thread.")

    # What the thread itself does.

    def _run(self) -> None:
        try:
            self.runner.measure()
            self._started.set_result(None)
            while not self._closing:
                try:
                    self._take_turn()
                except Exception as error:  # noqa: BLE001  # others go on, whatever it is
                    self._recover(error)
        except BaseException as error:  # noqa: BLE001  # whatever it is, nobody may wait forever
            if self._started.done():
                _log.exception("The service's thread failed")
                self.failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
            else:
                self._started.set_exception(error)
        finally:
            self._finish()

    def _take_turn(self) -> None:
        """One step of everybody: a chunk of one prompt, and the trees of those that decode."""
        if not self._wait_for_work():
            return
        groups, moved = self._arranged()
        if moved <= MOVED_BESIDES:
            self._prefill([job.row for jobs in groups for job in jobs if job.row is not None])
        for jobs in groups:
            self._decode(jobs)

    def _recover(self, error: Exception) -> None:
        """Ends what runs after a failure that is nobody's fault, and empties all rows.

        Raises:
            Exception: The failure, if there is nothing to end.
        """
        _log.error("A turn of the service failed", exc_info=error)
        with self.changed:
            jobs = [*self.scheduler.running.values()] or self.scheduler.waiting[:1]
            if not jobs:
                raise error
            for job in jobs:
                failure = BackendError(f"The service failed and has ended what was running: {error!r}.")
                failure.__cause__ = error
                self._end(job, failure)
            self.scheduler.forget()
            for row in range(self.scheduler.rows):
                self._reset(row)
        self.runner.forget_groups()

    def _finish(self) -> None:
        """Ends all requests, for one of two reasons, and closes the backend."""
        with self.changed:
            self._accepting = False
            for job in [*self.scheduler.running.values(), *self.scheduler.waiting]:
                outcome: MedusaError = ServiceClosedError("The service was closed before the request was answered.")
                if self.failure is not None:
                    outcome = BackendError(f"The service failed and is closed: {self.failure!r}.")
                    outcome.__cause__ = self.failure
                try:
                    self._end(job, outcome)
                except BaseException:  # noqa: BLE001  # whatever it is, nobody may wait forever
                    _log.exception("A request could not be ended in order")
                    if not job.handle.done:
                        job.handle.end(outcome)
            self._has_ended = True
            self.changed.notify_all()
        tell(self._metrics.load, 0, 0)
        try:
            self._backend.close()
        except MedusaError:
            _log.exception("The service's backend could not be closed")

    def _wait_for_work(self) -> bool:
        """Until something can run; False once the service is to be closed."""
        with self.changed:
            while not self._closing:
                self._let_go()
                self._admit()
                if self.scheduler.running:
                    tell(self._metrics.load, len(self.scheduler.waiting), len(self.scheduler.running))
                    return True
                tell(self._metrics.load, 0, 0)
                if not (self._closing or self.scheduler.waiting):  # by that hook
                    self.changed.wait()
            return False

    def _let_go(self) -> None:
        """Ends requests that were cancelled or have run out of time."""
        while not self._ends.empty():  # nobody else takes from it
            job, error = self._ends.get()
            if not job.handle.done:
                self._end(job, error)
        now = self._clock()
        for job in [*self.scheduler.running.values(), *self.scheduler.waiting]:
            if job.deadline is not None and now >= job.deadline:
                self._end(job, DeadlineError(f"The request was not answered in {job.deadline - job.submitted:g} s."))

    def _admit(self) -> None:
        if not self.scheduler.waiting:
            return
        try:
            lengths = self._backend.lengths
        except BackendError as error:
            if not self.scheduler.running:  # else it is tried again after their next step
                self._end(self.scheduler.waiting[0], error)
            return
        for admission in self.scheduler.admit(lengths):
            job, row = admission.job, admission.job.row
            assert row is not None
            job.admitted = self._clock()
            job.sequence.stats.queue_seconds = job.admitted - job.submitted
            with self._blamed_on(job):
                self.runner.take_over(admission.source, row, admission.shared)
                self._backend.assign(row, job.sequence.draws)

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
        chunk = job.sequence.next_chunk(self._prefill_chunk if decoding else LONE_CHUNK)
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
                    self._end(job, error)
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
                    self._end(job, error)

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
                self._end(job, failure)
            return
        job.handle.put(chunk)
        if job.sequence.finish_reason is not None:
            with self.changed:
                self._end(job, job.sequence.result())

    def _end(self, job: Job, outcome: GenerationResult | MedusaError) -> None:
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


def _rows(jobs: Sequence[Job]) -> list[int]:
    return [job.row for job in jobs if job.row is not None]

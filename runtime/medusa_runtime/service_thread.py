"""The thread that owns a service's backend: it takes turns until the service is closed.

A failure that no request is to blame for ends what runs. Where nothing runs or waits, the service has failed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from medusa_runtime.common.closeable import State
from medusa_runtime.decoding.runner import BatchRunner
from medusa_runtime.decoding.scheduler import Job, Scheduler
from medusa_runtime.decoding.turns import ServiceTurns
from medusa_runtime.errors import BackendError, DeadlineError, MedusaError, RequestError, ServiceClosedError
from medusa_runtime.metrics import Metrics, tell

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
        self._metrics = metrics
        self._clock = clock
        # Requests that somebody wants to end, and with what. Takes no lock, since a garbage collector may put it there.
        self._ends: SimpleQueue[tuple[Job, MedusaError]] = SimpleQueue()
        self._started: Future[None] = Future()
        self.changed = threading.Condition()  # guards all below, and the scheduler
        self.turns = ServiceTurns(
            runner, scheduler, self.changed, prefill_chunk=prefill_chunk, metrics=metrics, clock=clock
        )
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
            self.runner.backend.close()
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
                    if self._wait_for_work():
                        self.turns.take()
                except Exception as error:  # noqa: BLE001  # others go on, whatever it is
                    _log.error("A turn of the service failed", exc_info=error)
                    with self.changed:
                        self.turns.recover(error)
        except BaseException as error:  # noqa: BLE001  # whatever it is, nobody may wait forever
            if self._started.done():
                _log.exception("The service's thread failed")
                self.failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
            else:
                self._started.set_exception(error)
        finally:
            self._finish()

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
                    self.turns.end(job, outcome)
                except BaseException:  # noqa: BLE001  # whatever it is, nobody may wait forever
                    _log.exception("A request could not be ended in order")
                    if not job.handle.done:
                        job.handle.end(outcome)
            self._has_ended = True
            self.changed.notify_all()
        tell(self._metrics.load, 0, 0)
        try:
            self.runner.backend.close()
        except MedusaError:
            _log.exception("The service's backend could not be closed")

    def _wait_for_work(self) -> bool:
        """Until something can run; False once the service is to be closed."""
        with self.changed:
            while not self._closing:
                self._let_go()
                self.turns.admit()
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
                self.turns.end(job, error)
        now = self._clock()
        for job in [*self.scheduler.running.values(), *self.scheduler.waiting]:
            if job.deadline is not None and now >= job.deadline:
                self.turns.end(
                    job, DeadlineError(f"The request was not answered in {job.deadline - job.submitted:g} s.")
                )

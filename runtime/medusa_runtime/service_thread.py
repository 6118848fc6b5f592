"""The thread of a service: it owns the backend, and runs steps of the decode loop until the service is closed.

A failure that no request has caused ends the requests that run. The service itself fails if no request runs or waits
then, or if the device is lost.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from queue import SimpleQueue

from medusa_runtime.backends.base import Backend
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.common.closeable import State
from medusa_runtime.decoding.latency import measured_tables
from medusa_runtime.decoding.loop import DecodeLoop
from medusa_runtime.decoding.scheduler import Job
from medusa_runtime.decoding.tree_choice import TreeChoice
from medusa_runtime.errors import (
    BackendError,
    DeadlineError,
    DeviceLostError,
    MedusaError,
    RequestError,
    ServiceClosedError,
)
from medusa_runtime.metrics import call_hook

_log = logging.getLogger(__name__)


class ServiceThread:
    """Runs queued requests until it is closed. Other threads may call all public methods.

    Args:
        bundle: The bundle that the backend runs.
        backend: The backend.
        loop: The decode loop over the backend, without requests.

    Attributes:
        loop: The decode loop over the backend.
        scheduler: The loop's queue and rows.
        changed: Guards the scheduler. Is notified when something has changed.
        thread: The thread itself.
        failure: The exception that ended the thread; None if none did.
    """

    def __init__(self, bundle: Bundle, backend: Backend, loop: DecodeLoop) -> None:
        self.loop = loop
        self.scheduler = loop.scheduler
        self.changed = loop.changed
        self.failure: Exception | None = None
        self._bundle, self._backend = bundle, backend
        # Requests to be ended, and their errors. It takes no lock, as a garbage collector may add to it anywhere.
        self._ends: SimpleQueue[tuple[Job, MedusaError]] = SimpleQueue()
        self._started: Future[None] = Future()
        self._accepting = True
        self._closing = False
        self._has_ended = False
        self.thread = threading.Thread(target=self._run, name="medusa-service", daemon=True)

    # Methods for the threads of callers.

    def start(self) -> None:
        """Starts the thread and waits until it has measured steps, so that nothing else runs on these cores meanwhile.

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
        """``ready``, ``draining`` (it refuses new requests), ``closed``, or ``failed`` (an exception has ended it)."""
        if self.failure is not None:
            return "failed"
        if self._closing:
            return "closed"
        return "ready" if self._accepting else "draining"

    @property
    def load_figures(self) -> tuple[int, int]:
        """The number of requests that wait, and of those that run."""
        with self.changed:
            return len(self.scheduler.waiting), len(self.scheduler.running)

    def add(self, job: Job) -> None:
        """Queues a request.

        Raises:
            QueueFullError: The queue is full.
            RequestError: The request can't fit into the backend's caches.
            ServiceClosedError: The service refuses new requests.
        """
        with self.changed:
            if self.failure is not None:
                raise ServiceClosedError(f"This service has failed: {self.failure!r}. Load another.") from self.failure
            if not self._accepting:
                raise ServiceClosedError("This service takes no more requests: it is closed, or is about to be.")
            self.loop.check(job.sequence, self.loop.sizes.tree_size)
            self.scheduler.add(job)
            self.changed.notify_all()

    def request_end(self, job: Job, error: MedusaError) -> None:
        """Asks for the end of a request, before its next step. It takes no lock."""
        self._ends.put((job, error))  # without notifying: the thread sleeps only while no request runs or waits

    def drain(self, timeout: float | None) -> bool:
        """Refuses new requests and waits for those that run, for ``MedusaService.drain``."""
        self.check_thread()
        with self.changed:
            self._accepting = False
            return self.changed.wait_for(lambda: self.scheduler.is_idle or self._has_ended, timeout)

    def close(self) -> None:
        """Ends all requests and the thread, for ``MedusaService.close``."""
        with self.changed:
            self._accepting = False
            self._closing = True
            self.changed.notify_all()
        if self.thread.ident is not None and threading.current_thread() is not self.thread:  # a hook may call this
            self.thread.join()

    def check_thread(self) -> None:
        """Raises ``RequestError`` if a hook for metrics calls this in the thread, which can't wait for itself."""
        if threading.current_thread() is self.thread:
            raise RequestError("A hook for metrics can't wait for its own service: do this in another thread.")

    # Methods that run in the thread itself.

    def _run(self) -> None:
        try:
            if self.loop.sizes.tree_size == "auto":
                tables = measured_tables(self._bundle, self.loop.backend)
                self.loop.sizes.choice = TreeChoice(self._bundle.acceptance, self._bundle.tree, tables)
            self._started.set_result(None)
            while not self._closing:
                try:
                    if self._wait_for_work():
                        self.loop.step()
                except DeviceLostError:
                    raise
                except Exception as error:  # noqa: BLE001  # other requests go on, whatever the error
                    _log.error("A step of the service failed", exc_info=error)
                    self.loop.recover(error)
        except BaseException as error:  # noqa: BLE001  # whatever the error, no caller may wait forever
            if self._started.done():
                _log.exception("The service's thread failed")
                self.failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
            else:
                self._started.set_exception(error)
        finally:
            self._finish()

    def _finish(self) -> None:
        """Ends all requests, as the service was closed or has failed, and closes the backend."""
        with self.changed:
            self._accepting = False
            for job in [*self.scheduler.running.values(), *self.scheduler.waiting]:
                outcome: MedusaError = ServiceClosedError("The service was closed before the request was answered.")
                if self.failure is not None:
                    outcome = BackendError(f"The service failed and is closed: {self.failure!r}.")
                    outcome.__cause__ = self.failure
                try:
                    self.loop.end(job, outcome)
                except BaseException:  # noqa: BLE001  # whatever the error, no caller may wait forever
                    _log.exception("A request could not be ended in order")
                    if not job.receiver.done:
                        job.receiver.end(outcome)
            self._has_ended = True
            self.changed.notify_all()
        call_hook(self.loop.metrics.load, 0, 0)
        try:
            self.loop.backend.close()
        except MedusaError:
            _log.exception("The service's backend could not be closed")

    def _wait_for_work(self) -> bool:
        """Ends requests as asked, and waits until there are others; False once the service is to be closed."""
        with self.changed:
            while not self._closing:
                self._end_some()
                if not self.scheduler.is_idle:
                    return True
                self.loop.wake_readers()
                call_hook(self.loop.metrics.load, 0, 0)
                if not self._closing and self.scheduler.is_idle:  # that hook may have changed it
                    self.changed.wait()
            return False

    def _end_some(self) -> None:
        """Ends requests that were cancelled or are late."""
        while not self._ends.empty():  # no other thread takes from it
            job, error = self._ends.get()
            if not job.receiver.done:
                self.loop.end(job, error)
        now = self.loop.clock()
        for job in [*self.scheduler.running.values(), *self.scheduler.waiting]:
            if job.deadline is not None and now >= job.deadline:
                self.loop.end(
                    job, DeadlineError(f"The request was not answered in {job.deadline - job.submitted:g} s.")
                )

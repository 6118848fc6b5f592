"""The decode loop, which drives a backend for engine and service.

``DecodeLoop.step`` admits requests, takes in one chunk of one prompt, runs a decoding step of the rows whose prompt is
complete, and delivers the emitted tokens. ``MedusaEngine`` calls it with one row in the caller's thread.
``MedusaService`` calls it with several rows in a thread of its own.

A failure ends the requests that caused it, and no others:

1. A call for one request (its admission, a chunk of its prompt) ends that request.
2. A step of several requests is repeated for each alone, which shows the one that fails. If rows may have changed
   since, the step can't be repeated: all its requests end. If the step has run over all rows, all running requests end.
3. Moves of rows are skipped. The steps themselves fail if there is no room.
4. If the device is lost, no request can be answered any more: ``DeviceLostError`` is raised.
5. Any other failure is for the caller to ``recover`` from: all running requests end, and all rows are emptied. If none
   runs, the first one that waits ends, so that the same failure can't come again and again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from medusa_runtime.backends.base import Backend, Emitted, StepResult, limits_edits
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.decoding.chunks import PromptChunks
from medusa_runtime.decoding.endings import Endings
from medusa_runtime.decoding.runner import StepRunner
from medusa_runtime.decoding.scheduler import Admission, Job, Receiver, Scheduler
from medusa_runtime.decoding.sequence import TokenSequence
from medusa_runtime.decoding.tree_choice import TreeChoice, TreeSizes
from medusa_runtime.errors import BackendError, DeviceLostError, DoubtfulRowsError, RequestError
from medusa_runtime.metrics import Metrics, call_hook
from medusa_runtime.request import TreeSize
from medusa_runtime.tuning import LONE_CHUNK, MOVED_BESIDES

_log = logging.getLogger(__name__)


class DecodeLoop(Endings):
    """Runs requests over the rows of a backend, one synchronous step at a time.

    One thread at a time may call its methods. Other threads may look at ``scheduler``, and add to it, while they hold
    ``changed``.

    Args:
        bundle: The bundle that the backend runs.
        backend: The backend.
        max_queue: Requests that may wait for a row.
        tree_size: Nodes per row and step, or ``auto``.
        choice: Chooses them if it is ``auto``.
        prefill_chunk: Tokens of a prompt that one step takes in while other requests decode.
        metrics: Hooks that are called for steps and ends.
        clock: Gives seconds, and never goes back.

    Attributes:
        scheduler: The queue and the rows. ``changed`` guards it.
        changed: Is notified when a request has ended.
        sizes: The tree sizes of steps.
        prefill_chunk: Tokens of a prompt that one step takes in while other requests decode. It may be set between
            steps.
        lone_chunk: Tokens of a prompt that one step takes in while no request decodes. It may be set between steps.
        backend: The backend, which raises errors of this project only.
        metrics: Hooks that are called for steps and ends.
        clock: Gives seconds, and never goes back.
        reset_error: The error of the last attempt to empty a row; None if it worked.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        max_queue: int = 0,
        tree_size: TreeSize = "auto",
        choice: TreeChoice | None = None,
        prefill_chunk: int = LONE_CHUNK,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self.sizes = TreeSizes(tree_size, choice or TreeChoice(bundle.acceptance, bundle.tree, {}))
        self.runner = StepRunner(bundle, backend, self.sizes, self.wake_readers)
        super().__init__(self.runner, Scheduler(backend.rows, max_queue, copies=self.runner.copies), backend, metrics)
        self.prefill_chunk = prefill_chunk
        self.lone_chunk = LONE_CHUNK
        self._chunks = PromptChunks(self.runner, self.evict)
        self._unread: list[Receiver] = []
        self.clock = clock

    def step(self) -> None:
        """Admits requests, takes in chunks of prompts, decodes, and delivers the emitted tokens.

        Where each step of the backend runs over all rows, one step does all of that. Otherwise a step of its own takes
        in one chunk of one prompt.
        """
        if not self._in_flight:
            self.admit()
        call_hook(self.metrics.load, len(self.scheduler.waiting), len(self.scheduler.running))
        groups, moved = self._arranged()
        if self._room.is_shared and not self._in_flight and self._step_of_all([job for jobs in groups for job in jobs]):
            return
        if moved <= MOVED_BESIDES and not self._in_flight:
            self._prefill([job.row for jobs in groups for job in jobs if job.row is not None])
        for jobs in groups:
            self._decode(jobs)

    def check(self, sequence: TokenSequence, tree_size: TreeSize) -> None:
        """Refuses a request that the backend has no room for. Any thread may call it at any time.

        Args:
            sequence: The tokens of the request.
            tree_size: The tree size of its steps.

        Raises:
            RequestError: The request is too long, or its constraints name too many tokens; the message says by how
                much.
        """
        self._room.check(sequence.most_tokens, self.sizes.most(tree_size))
        if limits_edits(self.backend):
            sequence.limit_edits(self.backend.max_edits)

    def most_tokens(self, tree_size: TreeSize) -> int | None:
        """The most tokens of prompt and answer that fit into the backend's caches; None if the caches grow.

        Args:
            tree_size: The tree size of the request's steps.
        """
        return self._room.most_tokens(self.sizes.most(tree_size))

    def submit(self, job: Job) -> None:
        """Queues a request, and gives it a row if one is free."""
        with self.changed:
            self.scheduler.add(job)
            self.admit()

    def admit(self) -> None:
        """Gives free rows to requests that wait."""
        with self.changed:
            if not self.scheduler.waiting:
                return
            try:
                lengths = self.backend.lengths
            except BackendError as error:
                if not self.scheduler.running:  # else it is tried again after their next step
                    self.end(self.scheduler.waiting[0], error)
                return
            if not self._ownership.claim(lengths):
                self._take_over()
            for admission in self.scheduler.admit(lengths):
                self._begin(admission)

    def _take_over(self) -> None:
        """Empties all free rows, after something else has used the backend."""
        self.scheduler.evict()
        for row in range(self.scheduler.rows):
            if row not in self.scheduler.running:
                self._reset(row)

    def _begin(self, admission: Admission) -> None:
        """Prepares a row for a request."""
        job, row = admission.job, admission.job.row
        assert row is not None
        self._ownership.take(row)
        sequence = job.sequence
        job.admitted = self.clock()
        sequence.stats.queue_seconds = job.admitted - job.submitted
        with self._blamed_on(job):
            self._room.admit(sequence.most_tokens)
            self.runner.admit(row, admission.source, admission.shared, is_long=sequence.is_long)
            self.backend.assign(row, sequence.draws)

    def _arranged(self) -> tuple[list[list[Job]], int]:
        """The requests that decode, as they step together, with room for that; and the number of moved entries."""
        with self.changed:
            jobs = {job.row: job for job in self.scheduler.decoding() if job.row is not None}
        if not jobs:
            return [], 0
        moved = 0
        try:
            self._room.regroup(list(jobs))
        except BackendError:
            return [[job] for job in jobs.values()], 0  # the steps themselves will say so
        with contextlib.suppress(BackendError):  # they go on as they are
            moved += self._room.gather()
        for rows in self._room.groups:
            with contextlib.suppress(BackendError):  # the step itself will say so
                moved += self._room.prepare(rows)
        return [[jobs[row] for row in rows] for rows in self._room.groups], moved

    def _prefill(self, decoding: Sequence[int]) -> None:
        """Takes in one chunk of one prompt, beside rows that decode."""
        with self.changed:
            job = self.scheduler.prefilling()
        if job is None or job.row is None:
            return
        with self._blamed_on(job):
            chunk, moved = self._chunks.of(job, job.row, self._wanted_chunk(decoding), decoding)
            if moved > MOVED_BESIDES and decoding:
                return  # moving rows takes its time: the others first
            with self._timed("prefill", 1, len(chunk)) as tokens:
                result = self.runner.prefill(job.row, chunk, self.runner.chunk_size(job.row, len(chunk), decoding))
                if not result.count[job.row]:
                    result = self.runner.retry(job.row, chunk)
                tokens.append(len(chunk))
            self._take_in(job, chunk, result)

    def _wanted_chunk(self, decoding: Sequence[int]) -> int:
        """The most tokens of a chunk beside rows that decode."""
        return self.prefill_chunk if decoding else self.lone_chunk

    def _take_in(self, job: Job, chunk: Sequence[int], result: StepResult) -> None:
        """Notes that a chunk is in the cache; the last one gives the first token."""
        job.sequence.prefilled += len(chunk)
        if not job.sequence.is_prefilling and job.row is not None:
            job.first_token = self.clock()
            job.sequence.stats.prefill_seconds = job.first_token - job.admitted
            self._deliver(job, result.emitted(job.row))

    def _step_of_all(self, decoding: Sequence[Job]) -> bool:
        """Runs one step in which all prompts go on by a chunk and all other rows decode.

        Returns:
            False if prompts and decoding need separate steps: no prompt goes on, the step failed without an effect, or
            the answer of a request depends on the tree size, which a chunk makes larger.
        """
        with self.changed:
            prefilling = self.scheduler.all_prefilling()
        lone = len(prefilling) == 1 and not decoding
        if not prefilling or lone or any(job.sequence.is_typical for job in decoding):
            return False
        try:
            self._prefill_and_decode(prefilling, decoding)
        except DoubtfulRowsError as error:
            self._end_doubtful([*prefilling, *decoding], error)
        except DeviceLostError:
            raise
        except BackendError:
            _log.warning("A step of %d requests failed: trying parts of it", len(self.scheduler.running), exc_info=True)
            self.evict()
            return False
        return True

    def _prefill_and_decode(self, prefilling: Sequence[Job], decoding: Sequence[Job]) -> None:
        rows = _rows(decoding)
        hits = self._hits(decoding)
        tree_size = self.runner.tree_size(rows, hits) if rows else 1
        chunks, size = self._chunks.together(prefilling, self._wanted_chunk(rows), rows, tree_size)
        with self._timed("prefill", len(rows) + len(chunks), size) as tokens:
            result = self.runner.decode(rows, size, hits, chunks)
            tokens.append(sum(map(len, chunks.values())))
        parts = [(job, job.row, chunks[job.row]) for job in prefilling if job.row is not None]
        silent = [job for job, row in zip(decoding, rows, strict=True) if not result.count[row]]
        silent_parts = [part for part in parts if not result.count[part[1]]]
        for job, row, chunk in parts:
            if result.count[row]:
                self._take_in(job, chunk, result)
        for job in decoding:
            if job not in silent:
                self._deliver_step(job, result, min(size, self.runner.most_nodes))
        for job, row, chunk in silent_parts:  # their steps overwrite the result
            with self._blamed_on(job):
                self._take_in(job, chunk, self.runner.retry(row, chunk))
        for job in silent:
            self._retry(job)

    def _hits(self, jobs: Sequence[Job]) -> dict[int, list[int]]:
        """Lookup hits by row."""
        deepest = self.runner.deepest_hit
        return {job.row: hit for job in jobs if job.row is not None and (hit := job.sequence.look_up(deepest))}

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Runs a decoding step of some requests. If it fails, runs one for each alone, to see which one fails."""
        try:
            self._decode_together(jobs)
        except DoubtfulRowsError as error:
            self._end_doubtful(jobs, error)
        except DeviceLostError:
            raise
        except BackendError:
            _log.warning("A step of %d requests failed: trying each by itself", len(jobs), exc_info=True)
            self.evict()
            for job in jobs:
                with self._blamed_on(job):
                    self._decode_together([job])

    def _decode_together(self, jobs: Sequence[Job]) -> None:
        if not self._in_flight and self._room.is_crowded(self.sizes.largest):
            self.evict()
        if self._in_flight is not None and self._can_step_ahead(jobs):
            self._decode_ahead(jobs[0])
            return
        rows, hits = _rows(jobs), self._hits(jobs)
        size = self.runner.tree_size(rows, hits)
        with self._timed("decode", len(rows), size) as tokens:
            result = self.runner.decode(rows, size, hits)
            silent = [job for job, row in zip(jobs, rows, strict=True) if not result.count[row]]
            for job in jobs:
                if job not in silent:
                    tokens.append(self._deliver_step(job, result, size))
        for job in silent:
            self._retry(job)

    def _can_step_ahead(self, jobs: Sequence[Job]) -> bool:
        """True if the next step need not wait for this one: one request runs alone, without lookup and constraints."""
        if self._in_flight:
            return True
        sequence = jobs[0].sequence
        needs_host = sequence.is_constrained or (sequence.looks_up and self.runner.deepest_hit > 0)
        return len(jobs) == len(self.scheduler.running) == 1 and not needs_host

    def _decode_ahead(self, job: Job) -> None:
        """Runs a decoding step of the only request, and submits the one after it, unless another request waits."""
        assert job.row is not None
        sure = not self.scheduler.waiting and job.sequence.tokens_left > self.runner.deepest_hit + 1
        started = self.clock()
        size, result = self.runner.decode_ahead(job.row, is_sure=sure)
        if not result.count[job.row]:
            self._retry(job)
            return
        emitted = self._deliver_step(job, result, size)
        call_hook(self.metrics.step, "decode", 1, size, emitted, self.clock() - started)

    def _retry(self, job: Job) -> None:
        """Runs a plain step for a request whose last step emitted nothing."""
        with self._blamed_on(job), self._timed("decode", 1, 1) as tokens:
            tokens.append(self._deliver_step(job, self.runner.retry(_rows([job])[0]), 1))

    def _deliver_step(self, job: Job, result: StepResult, size: int) -> int:
        """Delivers the tokens that a step of ``size`` nodes emitted for a request; gives their number."""
        assert job.row is not None
        emitted = result.emitted(job.row)
        stats = job.sequence.stats
        stats.count_step(len(emitted.tokens), size)
        stats.decode_seconds = self.clock() - job.first_token
        self._deliver(job, emitted)
        return len(emitted.tokens)

    def _deliver(self, job: Job, emitted: Emitted) -> None:
        try:
            chunk = job.sequence.accept(*emitted)
        except RequestError as error:
            self.end(job, error)
            return
        except Exception as error:  # noqa: BLE001  # a tokenizer that fails ends its own request only
            failure = RequestError(f"The tokens of this request can't be made text: {error!r}.")
            failure.__cause__ = error
            self.end(job, failure)
            return
        job.receiver.put(chunk)
        if job.sequence.finish_reason is None:
            self._unread.append(job.receiver)
        else:
            self.end(job, job.sequence.result())

    def wake_readers(self) -> None:
        """Wakes the readers of the chunks that the last step added. Called when the next step is about to run.

        Python runs one thread at a time, so each reader that wakes earlier delays the next step.
        """
        unread, self._unread = self._unread, []
        for receiver in unread:
            receiver.wake()

    @contextlib.contextmanager
    def _timed(self, kind: str, rows: int, size: int) -> Iterator[list[int]]:
        """Reports a step that did not fail to the metrics; the block appends its numbers of tokens."""
        tokens: list[int] = []
        started = self.clock()
        yield tokens
        call_hook(self.metrics.step, kind, rows, size, sum(tokens), self.clock() - started)


def _rows(jobs: Sequence[Job]) -> list[int]:
    return [job.row for job in jobs if job.row is not None]

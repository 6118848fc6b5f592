"""A request that an engine runs, as an iterator of chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from medusa_runtime.common.critical_section import CriticalSection
from medusa_runtime.common.processes import ProcessBound
from medusa_runtime.decoding.scheduler import Job
from medusa_runtime.errors import MedusaError, RequestError
from medusa_runtime.request import Chunk, GenerationResult, Stats


class RunsSteps(Protocol):
    """The part of an engine that its streams need."""

    def check_process(self) -> None:
        """Raises ``ForkError`` in a forked child."""

    def advance(self, job: Job, turn: int) -> None:
        """Runs one step of a stream.

        Args:
            job: The stream's request.
            turn: The number of its turn.
        """


class Answer:
    """Receives chunks and the end of a request for a stream."""

    def __init__(self) -> None:
        self.chunks: deque[Chunk] = deque()
        self.outcome: GenerationResult | MedusaError | None = None

    @property
    def done(self) -> bool:
        """True once the request has ended."""
        return self.outcome is not None

    @property
    def error(self) -> MedusaError | None:
        """The error that ended the request, if one did."""
        return self.outcome if isinstance(self.outcome, MedusaError) else None

    def put(self, chunk: Chunk) -> None:
        """Receives the next chunk."""
        self.chunks.append(chunk)

    def wake(self) -> None:
        """Does nothing: the reader runs the steps itself."""

    def end(self, outcome: GenerationResult | MedusaError) -> None:
        """Receives the end."""
        self.outcome = outcome


class GenerationStream(Iterator[Chunk], ProcessBound):
    """A request that an engine runs: iterate over it for chunks, or call ``result()``, which runs it to its end.

    Threads may share a stream: each chunk goes to one of them. Its calls block. In a child made by ``fork`` they raise
    ``ForkError``.

    Args:
        job: The request.
        answer: Receives its chunks and its end.
        engine: Runs its steps.
        turn: The number of its turn in the engine.
    """

    def __init__(self, job: Job, answer: Answer, engine: RunsSteps, turn: int) -> None:
        super().__init__()
        self._job = job
        self._sequence = job.sequence
        self._answer = answer
        self._engine = engine
        self._turn = turn
        self._reading = CriticalSection("This stream")
        self._failure: Exception | None = None  # the error that ended it early

    @property
    def finish_reason(self) -> str | None:
        """``stop`` or ``length`` once the text has ended, None before."""
        return self._sequence.finish_reason

    @property
    def stats(self) -> Stats:
        """Figures of the request so far."""
        return self._sequence.stats

    def __next__(self) -> Chunk:
        if self.finish_reason is not None:
            raise StopIteration
        self._engine.check_process()
        with self._reading.entered():
            if self.finish_reason is not None:  # another thread has read the last chunk
                raise StopIteration
            if self._failure is not None:
                raise self._failure
            try:
                return self._next_chunk()
            except Exception as error:
                self._failure = error
                raise
            except BaseException:
                self._failure = RequestError("This stream was interrupted: begin another.")
                raise

    def _next_chunk(self) -> Chunk:
        """Runs steps until one emits something: chunks of the prompt emit nothing, except the last one."""
        while not self._answer.chunks:
            if self._answer.error is not None:
                raise self._answer.error
            self._engine.advance(self._job, self._turn)
        return self._answer.chunks.popleft()

    def result(self) -> GenerationResult:
        """Runs the request to its end and gives the complete answer."""
        while self.finish_reason is None:
            next(self, None)
        return self._sequence.result()

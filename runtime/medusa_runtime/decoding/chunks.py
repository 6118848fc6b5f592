"""Chunks of prompts, with room for the steps that take them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from medusa_runtime.decoding.runner import StepRunner
from medusa_runtime.decoding.scheduler import Job
from medusa_runtime.errors import BackendError


class PromptChunks:
    """Cuts prompts into chunks that there is room for.

    Args:
        runner: Runs the steps.
        evict: Gives up the entries of free rows, which may take the room that is needed.
    """

    def __init__(self, runner: StepRunner, evict: Callable[[], None]) -> None:
        self._runner, self._room, self._evict = runner, runner.room, evict

    def of(self, job: Job, row: int, wanted: int, decoding: Sequence[int]) -> tuple[Sequence[int], int]:
        """The next chunk of one prompt, for a step of its own.

        Args:
            job: The request.
            row: The request's row.
            wanted: The most tokens of the chunk.
            decoding: Rows that decode.

        Returns:
            The chunk, and the number of entries that were moved to make room.

        Raises:
            BackendError: There is no room.
        """
        make = self._room.make_in_part if decoding else lambda row, size: self._room.make([row], size)
        chunk = job.sequence.next_chunk(self._runner.chunk_limit(wanted, job.sequence.prefilled))
        try:
            return chunk, make(row, self._runner.chunk_size(row, len(chunk), decoding))
        except BackendError:
            self._evict()
            chunk = chunk[: self._room.fitting(len(chunk))]
            return chunk, make(row, self._runner.chunk_size(row, len(chunk), decoding))

    def together(
        self, jobs: Sequence[Job], wanted: int, decoding: Sequence[int], tree_size: int
    ) -> tuple[dict[int, Sequence[int]], int]:
        """The next chunks of several prompts, for one step that rows which decode take part in, too.

        Args:
            jobs: The requests.
            wanted: The most tokens of a chunk.
            decoding: Rows that verify their trees in this step.
            tree_size: Nodes of a tree that these rows should verify. They verify more if a chunk is longer.

        Returns:
            The chunks by row, and the size of the step.

        Raises:
            BackendError: There is no room.
        """
        chunks = {
            job.row: job.sequence.next_chunk(self._runner.chunk_limit(wanted, job.sequence.prefilled))
            for job in jobs
            if job.row is not None
        }
        sizes = [self._runner.chunk_size(row, len(chunk), decoding) for row, chunk in chunks.items()]
        size = max(tree_size, *sizes)
        rows = [*decoding, *chunks]
        try:
            self._room.make(rows, size)
        except BackendError:
            self._evict()
            size = self._room.fitting(size)
            chunks = {row: chunk[:size] for row, chunk in chunks.items()}
            self._room.make(rows, size)
        return chunks, size

"""Steps of the reference. Backends that are checked one after the other share those that they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medusa_export.step.eager import EagerBackend
from medusa_export.step.step import MedusaStep, StepOutput

MOST_KEPT = 2**30  # bytes of logits that are kept at a time


class _Begin(NamedTuple):
    """Empties all rows.

    Attributes:
        capacity: Slots per row.
        is_long: Per row, whether it takes the rotary frequencies of long requests.
    """

    capacity: int
    is_long: tuple[bool, ...]


class _Step(NamedTuple):
    """The inputs of one step.

    Attributes:
        width: Tokens per row.
        parts: The chunks of rows that take in a prompt, by row.
        drafts: [rows, T], the trees of all rows, as bytes.
    """

    width: int
    parts: tuple[tuple[int, tuple[int, ...]], ...]
    drafts: bytes


class ReferenceSteps:
    """Runs the eager module, and keeps what each step gave, by all that came before it since the rows were empty.

    The graphs of a bundle take the same steps as long as they are right, so these are computed once.

    Args:
        step: The reference.
        rows: The number of rows.
        most_kept: The size of the logits that are kept, in bytes, at most. Later steps are computed each time.

    Attributes:
        drafts: [rows, T], the tree that each row verifies next; the caller may write other tokens to all nodes.
    """

    def __init__(self, step: MedusaStep, rows: int, *, most_kept: int = MOST_KEPT) -> None:
        self._step, self._eager = step, EagerBackend(step, rows=rows)
        self.drafts: NDArray[np.int64] = np.zeros_like(self._eager.drafts)
        self._path: tuple[_Begin | _Step, ...] = ()
        self._taken = 0  # so many entries of the path are in the eager module's state
        self._kept: dict[tuple[_Begin | _Step, ...], StepOutput] = {}
        self._room = most_kept

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.drafts)

    @property
    def has_heads(self) -> bool:
        """True if the steps draft with heads."""
        return self._step.heads is not None

    def begin(self, capacity: int, is_long: Sequence[bool]) -> None:
        """Empties all rows.

        Args:
            capacity: Slots per row that the next steps need.
            is_long: Per row, whether it takes the rotary frequencies of long requests.
        """
        self._path, self._taken = (_Begin(capacity, tuple(is_long)),), 0
        self.drafts[:] = 0

    def step(self, width: int, parts: Mapping[int, Sequence[int]]) -> StepOutput:
        """The output of the next step, without its caches.

        Args:
            width: Tokens per row.
            parts: The chunks of rows that take in a prompt, by row.
        """
        given = tuple((row, tuple(part)) for row, part in sorted(parts.items()))
        self._path = (*self._path, _Step(width, given, self.drafts.tobytes()))
        output = self._kept.get(self._path)
        if output is None:
            output = self._computed()
            logits = [values for values in (output.logits, output.head_logits) if values is not None]
            size = sum(values.nbytes for values in logits)
            if size <= self._room:
                self._room -= size
                self._kept[self._path] = output
        self.drafts[:] = output.next_input_ids
        return output

    def _computed(self) -> StepOutput:
        """Takes the last step of the path, after those before it that were not taken because they were known."""
        for entry in self._path[self._taken :]:
            if isinstance(entry, _Begin):
                self._begin(entry)
            else:
                self._eager.drafts[:] = np.frombuffer(entry.drafts, np.int64).reshape(self.drafts.shape)
                self._eager.step(entry.width, dict(entry.parts))
        self._taken = len(self._path)
        assert self._eager.output is not None
        return replace(self._eager.output, present=[], next_pending=[], sampled=None)

    def _begin(self, entry: _Begin) -> None:
        self._eager.reserve(entry.capacity)
        for row, is_long in enumerate(entry.is_long):
            self._eager.reset(row)
            self._eager.set_long(row, is_long)

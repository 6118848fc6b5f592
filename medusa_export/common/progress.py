"""Progress of long jobs, reported to a callback."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

BYTES = "bytes"


@dataclass(frozen=True)
class Progress:
    """A report on a running job. ``str()`` gives it as a line of text.

    Attributes:
        message: The job's present action, or its finding.
        done: Finished pieces of work; None if the work is not counted.
        total: All pieces of work; None if the work is not counted.
        rate: Speed as text, such as ``1,200 tokens/s``; empty if the job does not measure it.
        unit: What the pieces are: ``BYTES``, or empty for anything else.
    """

    message: str
    done: int | None = None
    total: int | None = None
    rate: str = ""
    unit: str = ""

    def __str__(self) -> str:
        counted = "" if self.done is None or self.total is None else f": {self._counted(self.done, self.total)}"
        return f"{self.message}{counted}{', ' if self.rate else ''}{self.rate}"

    def _counted(self, done: int, total: int) -> str:
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB" if self.unit == BYTES else f"{done:,} of {total:,}"


# Receives reports. It runs in the thread of the job, so it should return at once; an exception from it ends the job.
OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """Drops all reports: the default of ``on_progress``."""


class Task:
    """A job of countable pieces: counts those that are finished, and reports each change.

    Args:
        message: The job's action, such as ``answering``.
        total: All pieces of work.
        on_progress: Receives the reports.
        done: Pieces that were finished before the start.
        unit: The unit that ``add`` counts, such as ``tokens``; ``BYTES`` if the pieces are bytes.
    """

    def __init__(self, message: str, total: int, on_progress: OnProgress, *, done: int = 0, unit: str = "") -> None:
        self._message, self._total, self._done, self._unit = message, total, done, unit
        self._on_progress = on_progress
        self._started = time.monotonic()
        self._amount = 0
        self._report()

    def add(self, amount: int) -> None:
        """Counts work within a piece, for the rate.

        Args:
            amount: Units of work.
        """
        self._amount += amount
        self._report()

    def finish_piece(self) -> None:
        """Counts one more finished piece."""
        self.reach(self._done + 1)

    def reach(self, done: int) -> None:
        """Sets the number of finished pieces.

        Args:
            done: Finished pieces; the total if it is more.
        """
        self._done = min(done, self._total)
        self._report()

    def _report(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f"{self._amount / seconds:,.0f} {self._unit}/s" if self._amount else ""
        unit = BYTES if self._unit == BYTES else ""
        self._on_progress(Progress(self._message, self._done, self._total, rate, unit))

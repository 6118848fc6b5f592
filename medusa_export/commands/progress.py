"""Progress and warnings on stderr."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from medusa_export.common.errors import MedusaWarning
from medusa_export.common.progress import BYTES, OnProgress, Progress, ignore_progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

# Seconds between two lines of a log about one counted job.
_PAUSE = 15.0


@contextmanager
def shown_progress(*, quiet: bool) -> Iterator[OnProgress]:
    """Gives a callback that shows reports on stderr while the block lasts.

    A report that counts nothing is a line with the time since the start. A counted one is a bar on a terminal, and
    otherwise a line every 15 seconds.

    Args:
        quiet: Show nothing.
    """
    if quiet:
        yield ignore_progress
        return
    shown = _Shown()
    shown(Progress("starting"))  # what is imported next takes seconds
    try:
        yield shown
    finally:
        shown.end_bar()
    shown(Progress("done"))


class _Shown:
    """Shows reports: a callback."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._counted: _Counted | None = None
        self._bars: Bars | None = None
        self._bar: TaskID | None = None

    def __call__(self, report: Progress) -> None:
        if report.done is None or report.total is None:
            self._echo(f"[{time.monotonic() - self._started:6.1f} s] {report}")
            return
        if self._counted is None or self._counted.message != report.message:
            self.end_bar()
            self._counted = _Counted(report.message, report.done)
            self._start_bar(report)
        self._show(report, self._counted)

    def _echo(self, text: str) -> None:
        if self._bars is None:
            click.echo(text, err=True)
        else:
            self._bars.console.print(text, highlight=False, markup=False)  # above the bar

    def _start_bar(self, report: Progress) -> None:
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn() if report.unit == BYTES else MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bars = Bars(*columns, console=Console(stderr=True))
        self._bars.start()
        self._bar = self._bars.add_task(report.message, total=report.total, completed=report.done or 0, rate="")

    def _show(self, report: Progress, counted: _Counted) -> None:
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=report.done, rate=report.rate)
        elif counted.is_due(report):
            click.echo(counted.line(report), err=True)

    def end_bar(self) -> None:
        """Takes the bar away, if there is one."""
        if self._bars is not None:
            self._bars.stop()
        self._counted = self._bars = self._bar = None


class _Counted:
    """A counted job in a log.

    Args:
        message: The job's action, such as ``answering``.
        done: Pieces that were finished when it started.
    """

    def __init__(self, message: str, done: int) -> None:
        self.message = message
        self._done_before = done
        self._started = self._last = time.monotonic()
        self._is_finished = False

    def is_due(self, report: Progress) -> bool:
        """True if the report is shown: the last line is older than the pause, or the job is finished."""
        finishes = report.done == report.total and not self._is_finished
        due = finishes or time.monotonic() - self._last >= _PAUSE
        self._is_finished |= finishes
        if due:
            self._last = time.monotonic()
        return due

    def line(self, report: Progress) -> str:
        """The report with an estimate of the time left."""
        assert report.done is not None and report.total is not None
        finished = report.done - self._done_before
        left = "?"
        if finished > 0:
            seconds = (time.monotonic() - self._started) / finished * (report.total - report.done)
            left = str(timedelta(seconds=round(seconds)))
        return f"{report}, {left} left"


@contextmanager
def shown_warnings(worded: Callable[[str], str]) -> Iterator[None]:
    """Shows warnings of this package on stderr as one line each, while the block lasts; others are left as they are.

    Args:
        worded: Gives a warning the words of the command line.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", MedusaWarning)
        show_others: Callable[..., None] = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
            if issubclass(category, MedusaWarning):
                click.echo(f"warning: {worded(str(message))}", err=True)
            else:
                show_others(message, category, *rest, **options)

        warnings.showwarning = show
        yield

"""How far a long job is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds between two lines of a log.
_PAUSE = 15.0


class Bar:
    """Counts finished pieces of work, and what they are worth.

    Args:
        name: What is being done.
        total: Pieces in all.
        done: Pieces that were there from the start.
        unit: What ``add`` counts.
        show: Shown a new state, at most a few times a second.
    """

    def __init__(self, name: str, total: int, done: int, unit: str, show: Callable[[Bar], None]) -> None:
        self.name, self.total, self.done, self.unit = name, total, done, unit
        self._show = show
        self._started, self._at_start = time.monotonic(), done
        self._amount = 0

    def add(self, amount: int) -> None:
        """Notes work within a piece."""
        self._amount += amount
        self._show(self)

    def finish_piece(self) -> None:
        """One piece more is done."""
        self.reach(self.done + 1)

    def reach(self, done: int) -> None:
        """So many pieces are done."""
        self.done = min(done, self.total)
        self._show(self)

    @property
    def rate(self) -> str:
        """Units per second in words."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._amount / seconds:,.0f} {self.unit}/s" if self._amount else ""

    @property
    def left(self) -> str:
        """Time left in words."""
        made = self.done - self._at_start
        if made <= 0:
            return "?"
        seconds = (time.monotonic() - self._started) / made * (self.total - self.done)
        return str(timedelta(seconds=round(seconds)))


@contextmanager
def progress_bar(name: str, total: int, *, done: int = 0, unit: str = "", quiet: bool = False) -> Iterator[Bar]:
    """A bar for as long as the block lasts, on stderr."""
    console = Console(stderr=True)
    if quiet:
        yield Bar(name, total, done, unit, lambda _: None)
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as shown:
            task = shown.add_task(name, total=total, completed=done, rate="")
            yield Bar(name, total, done, unit, lambda bar: shown.update(task, completed=bar.done, rate=bar.rate))
    else:
        last = [time.monotonic()]

        def line(bar: Bar) -> None:
            if time.monotonic() - last[0] >= _PAUSE or bar.done == bar.total:
                last[0] = time.monotonic()
                words = [f"{bar.name}: {bar.done} of {bar.total}", bar.rate, f"{bar.left} left"]
                click.echo(", ".join(word for word in words if word), err=True)

        yield Bar(name, total, done, unit, line)

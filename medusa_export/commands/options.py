"""What several commands share: options, failures, and progress on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

# What --dtype may be, and what torch calls it.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Failure(click.ClickException):
    """An error of ours as one line on stderr, exit code 1."""

    def show(self, file: object = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class NotRun(Failure):
    """What was asked for can't be tried on this machine, which is no failure of what it was asked of: exit code 3."""

    exit_code = 3

    def show(self, file: object = None) -> None:
        click.echo(f"not run: {self.message}", err=True)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around a command's imports: a missing package becomes the name of the extra that holds it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("medusa_export", "medusa_runtime"):
            raise
        raise Failure(
            f"This command needs the package {error.name!r}. Install it with: pip install 'medusa-export[{name}]'"
        ) from error


def sizes(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    """A callback for options such as 1,4,10."""
    parts = None if value is None else [part.strip() for part in value.split(",")]
    if parts is not None and not all(part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of sizes: give numbers, separated by commas.")
    return None if parts is None else [int(part) for part in parts]


def sizes_or_full(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int | str] | None:
    """The same, with 'full' among the numbers."""
    if value is None:
        return None
    found: list[int | str] = []
    for part in (part.strip() for part in value.split(",")):
        if part != "full" and not (part.isdigit() and int(part) > 0):
            raise click.BadParameter(f"{value!r} is not a list of sizes: give numbers or 'full', separated by commas.")
        found.append(part if part == "full" else int(part))
    return found


class Progress:
    """Says on stderr what is being done, and how long it took."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._started = time.monotonic()

    def __call__(self, doing: str) -> None:
        if not self._quiet:
            click.echo(f"[{time.monotonic() - self._started:6.1f} s] {doing}", err=True)

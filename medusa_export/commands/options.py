"""Options and failures that several commands share."""

from __future__ import annotations

import click

from medusa_export.common.errors import OptionError


class Failure(click.ClickException):
    """An error of this package: one line on stderr, exit code 1."""

    def show(self, file: object = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class NotRun(Failure):
    """A check that this machine can't run, which says nothing about the bundle: exit code 3."""

    exit_code = 3

    def show(self, file: object = None) -> None:
        click.echo(f"not run: {self.message}", err=True)


class Command(click.Command):
    """A command that shows an ``OptionError`` as a usage error, exit code 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except OptionError as error:
            raise click.UsageError(str(error), ctx) from error


def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    """A callback for options such as sm86,sm89."""
    if value is None:
        return ()
    found = tuple(part.strip() for part in value.split(",") if part.strip())
    if not found:
        raise click.BadParameter(f"{value!r} names nothing: give names, separated by commas.")
    return found


def sizes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """A callback for options such as 1,4,10."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of sizes: give numbers, separated by commas.")
    return tuple(map(int, parts))


def sizes_or_full(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int | str, ...] | None:
    """A callback for options such as 1,4,full."""
    if value is None:
        return None
    found: list[int | str] = []
    for part in (part.strip() for part in value.split(",")):
        if part != "full" and not (part.isdecimal() and int(part) > 0):
            raise click.BadParameter(f"{value!r} is not a list of sizes: give numbers or 'full', separated by commas.")
        found.append(part if part == "full" else int(part))
    return tuple(found)

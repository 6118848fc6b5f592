"""The base of the commands: it shows errors and warnings of the API in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click

from medusa_export.commands.progress import shown_warnings
from medusa_export.common.errors import OptionError
from medusa_runtime.errors import MedusaError

# An argument of the API in a message: `name` or `name=value`.
_ARGUMENT = re.compile(r"`(?P<name>[a-z]\w*)(?:=(?P<value>[^`]+))?`")
# Arguments whose options have other names.
_RENAMED = {"with_tokenizer=False": "--no-tokenizer", "narrowed={'lm_head'}": "--lm-head-weights int4"}


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
    """A command that shows errors and warnings of the API, with its options in the place of the API's arguments.

    An ``OptionError`` is a usage error, exit code 2. Other errors have exit code 1.
    """

    def invoke(self, ctx: click.Context) -> object:
        try:
            with shown_warnings(self._with_options):
                return super().invoke(ctx)
        except OptionError as error:
            raise click.UsageError(self._with_options(str(error)), ctx) from error
        except MedusaError as error:
            raise Failure(self._with_options(str(error))) from error

    def _with_options(self, message: str) -> str:
        return _ARGUMENT.sub(lambda found: _as_option(found, self.params), message)


def _as_option(found: re.Match[str], parameters: Sequence[click.Parameter]) -> str:
    """Returns the option for an argument of the API in a message; the argument if the command has no such option."""
    name, value = found["name"], found["value"]
    if renamed := _RENAMED.get(found[0].strip("`")):
        return renamed
    option = next((option for option in parameters if option.name == name and isinstance(option, click.Option)), None)
    if option is None:
        return found[0]
    if value == "False" and option.secondary_opts:
        return option.secondary_opts[-1]
    given = "" if value in (None, "True") else f" {value}".replace("'", "")
    return option.opts[-1] + given

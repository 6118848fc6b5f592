"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from click.core import ParameterSource

from medusa_export.common.dtypes import DTYPES

F = TypeVar("F", bound=Callable[..., Any])

# Values of options
PATH = click.Path(path_type=Path)
COUNT = click.IntRange(1)
POSITIVE = click.FloatRange(0, min_open=True)


class Decorator(Protocol):
    """Adds an option to a function."""

    def __call__(self, function: F, /) -> F:
        """Returns the function with the option."""
        ...


quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
text_only_option = click.option(
    "--text-only", is_flag=True, help="Take the text model out of a larger one, such as one for images and text."
)
device_option = click.option(
    "--device", help="The device to run on, such as cuda:1. [default: the GPU, if there is one]"
)
heads_option = click.option(
    "--heads", metavar="PATH", required=True, help="The heads: a file, a folder or a hub id, in any published format."
)


def output_option(content: str) -> Decorator:
    """The option ``-o``, the file or the folder to write.

    Args:
        content: A sentence about the file or folder.
    """
    return click.option("-o", "--output", type=PATH, required=True, help=content)


def overwrite_option(noun: str) -> Decorator:
    """The flag ``--overwrite``.

    Args:
        noun: The kind of folder that may be replaced, with its article.
    """
    return click.option("--overwrite", is_flag=True, help=f"Replace {noun} that is there.")


def strict_option(noun: str) -> Decorator:
    """The flag ``--strict``.

    Args:
        noun: The source that is refused, such as ``files``.
    """
    return click.option(
        "--strict", is_flag=True, help=f"Refuse {noun} with rows that can't be used, instead of skipping them."
    )


def data_option(content: str) -> Decorator:
    """The option ``--data``, data sets.

    Args:
        content: The kinds of data sets.
    """
    text = f"{content}. May be given more than once."
    return click.option("--data", type=PATH, required=True, multiple=True, help=text)


def dtype_option(owner: str) -> Decorator:
    """The option ``--dtype`` of a command that runs a model.

    Args:
        owner: The owner of the weights, in the genitive, such as ``the model's``.
    """
    text = f"Type of {owner} weights. [default: bf16 on a GPU, else fp32]"
    return click.option("--dtype", type=click.Choice(DTYPES), help=text)


def option_with_default(*names: str, kind: click.ParamType[Any], default: object, text: str) -> Decorator:
    """An option with a default that the help shows.

    Args:
        names: Its names.
        kind: The values that it takes.
        default: Its default.
        text: Its help.
    """
    return click.option(*names, type=kind, default=default, show_default=True, help=text)


def refuse_without_effect(context: click.Context, name: str, *, needs: str, given: bool) -> None:
    """Refuses an option that is given on the command line, but would change nothing.

    Args:
        context: The command's context.
        name: The name of the option's argument.
        needs: The options that give it an effect, for the message.
        given: True if these options are given.

    Raises:
        click.UsageError: The option is given without the others.
    """
    if given or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
        return
    option = next(option for option in context.command.params if option.name == name)
    raise click.UsageError(
        f"{'/'.join([*option.opts, *option.secondary_opts])} has an effect only with {needs}.", context
    )


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

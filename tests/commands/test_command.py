"""Errors and warnings: the API names its arguments, and a command names its options in their place."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import medusa_export
from medusa_export.cli import main
from medusa_export.commands.command import Command
from medusa_export.commands.options import option_with_default, overwrite_option
from medusa_export.common.errors import ExportError, MedusaWarning, OptionError

PACKAGE = Path(medusa_export.__file__).parent
ARGUMENT = re.compile(r"`([a-z]\w*)(?:=[^`]*)?`")


@click.command("try", cls=Command)
@option_with_default("-n", "--max-new-tokens", kind=click.INT, default=1, text="Tokens.")
@click.option("--target", "targets")
@click.option("--conditioned/--plain", default=True)
@click.option("--no-tokenizer", is_flag=True)
@overwrite_option("a bundle")
@click.pass_obj
def command(failure: Exception, **_: object) -> None:
    """Raise an error or give a warning."""
    if isinstance(failure, Warning):
        warnings.warn(failure, stacklevel=1)
        return
    raise failure


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Lower `max_new_tokens`.", "Lower --max-new-tokens."),
        ("`max_new_tokens=5` is too small.", "--max-new-tokens 5 is too small."),
        ("Drop `targets`, or use `overwrite=True`.", "Drop --target, or use --overwrite."),
        ("Use `targets='sm89'` or `conditioned=False`.", "Use --target sm89 or --plain."),
        ("Use `with_tokenizer=False`.", "Use --no-tokenizer."),
        ("Use `dtype='fp32'`, not targets.", "Use `dtype='fp32'`, not targets."),  # no option of this command
    ],
)
def test_arguments_become_options(message: str, shown: str) -> None:
    def run(failure: Exception) -> tuple[int, str]:
        result = CliRunner().invoke(command, [], obj=failure)
        return result.exit_code, result.output

    assert run(ExportError(message)) == (1, f"error: {shown}\n")
    code, output = run(OptionError(message))
    assert code == 2 and output.endswith(f"Error: {shown}\n")
    assert run(MedusaWarning(message)) == (0, f"warning: {shown}\n")


def strings() -> Iterator[tuple[Path, str]]:
    """The strings of the exporter's modules, without docstrings and without the command line."""
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "commands") or path.name == "cli.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = {id(node.body[0].value) for node in ast.walk(tree)
                 if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
                yield path, node.value


def test_messages_of_the_api_name_no_option() -> None:
    """An option of another program, such as pip, is in a command of that program."""
    named = [(path.name, text) for path, text in strings() if re.search(r"(?<![\w-])--[a-z]", text)]
    others = ("llama-gguf-split --merge", "pip install --upgrade")
    assert [text for _, text in named if not any(command in text for command in others)] == []


def test_messages_name_arguments_that_exist() -> None:
    public = [getattr(medusa_export, name) for name in medusa_export.__all__ if name != "OnProgress"]
    known = {name for one in public if inspect.isfunction(one) for name in inspect.signature(one).parameters}
    known |= {field.name for one in public if dataclasses.is_dataclass(one) for field in dataclasses.fields(one)}
    named = {name for _, text in strings() for name in ARGUMENT.findall(text)}
    assert len(named) > 10
    assert named <= known


def test_each_command_words_its_messages() -> None:
    for name in main.list_commands(click.Context(main)):
        found = main.get_command(click.Context(main), name)
        commands = found.commands.values() if isinstance(found, click.Group) else [found]
        assert all(isinstance(each, Command) for each in commands), name

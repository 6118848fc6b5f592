"""Runs commands in this process."""

from __future__ import annotations

from click.testing import CliRunner

from medusa_export.cli import main


def run(*arguments: object) -> tuple[int, str]:
    """Runs a command that must not end with a traceback. Returns its exit code, and what it printed."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output

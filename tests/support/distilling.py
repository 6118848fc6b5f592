"""Runs ``medusa-export distill`` in tests."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from medusa_export.cli import main


def distilled(model: Path, folder: Path, *options: object) -> tuple[int, str]:
    """The command's exit code and output."""
    arguments = ["distill", model, "-o", folder, "--batch-size", 4, "-n", 12, "--heldout", 0.3, *options]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output

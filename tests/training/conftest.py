"""Fixtures of trainings."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from medusa_export.cli import main
from support.training import train, write_talks


@pytest.fixture(scope="session")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 conversations."""
    return write_talks(tmp_path_factory.mktemp("talks") / "talks.jsonl")


@pytest.fixture(scope="session")
def whole(tiny_model_folder: Path, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by both stages of Medusa-2 that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert CliRunner().invoke(main, train(tiny_model_folder, talks, out, "--recipe", "medusa2")).exit_code == 0
    return out

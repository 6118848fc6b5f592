"""Folders that test runs share, and that are kept for later runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support import stock
from support.stock import KEPT_SECONDS, Stock


def test_folders_are_kept_until_what_makes_them_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def fill(folder: Path) -> None:
        folder.mkdir()
        made.append(folder)

    def of_a_new_run(*, keep: bool = True) -> Path:
        number = len(list(tmp_path.glob("run*")))
        (tmp_path / f"run{number}").mkdir()
        return Stock.beside(tmp_path / f"run{number}").folder("name", fill, keep=keep)

    monkeypatch.delenv("MEDUSA_TEST_STOCK", raising=False)
    assert of_a_new_run() != of_a_new_run()
    assert len(made) == 2
    monkeypatch.setenv("MEDUSA_TEST_STOCK", str(tmp_path / "kept"))
    kept = of_a_new_run()
    assert of_a_new_run() == kept
    assert len(made) == 3
    assert of_a_new_run(keep=False) != kept
    monkeypatch.setattr(stock, "makers", lambda: b"changed")
    assert of_a_new_run() != kept
    assert len(made) == 5
    os.utime(kept.with_suffix(".used"), (0, KEPT_SECONDS))
    of_a_new_run()
    assert not kept.exists()

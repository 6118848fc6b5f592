"""``scripts/benchmark.py`` runs, and its figures are of the right steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from medusa_runtime import Bundle
from support.script import load_script
from support.stock import Stock


@pytest.mark.slow
def test_plain_decoding_is_compared(tiny_bundle: Bundle, stock: Stock, tmp_path: Path) -> None:
    arguments = [
        "--heads", tiny_bundle.folder, "--no-heads", stock.export(heads=False).bundle.folder, "--threads", 1,
        "--rounds", 2, "--tokens", 12, "--tree-size", 9, "--json", tmp_path / "report.json",
    ]  # fmt: skip
    result = CliRunner().invoke(load_script("benchmark").main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0 < report["host_overhead"] < 1
    assert len(report["contestants"]) == 4
    for name, found in report["contestants"].items():
        assert name in " ".join(result.output.split()) or "tree size" in name
        assert len(found["seconds_per_step"]) == 2 and min(found["seconds_per_step"]) > 0

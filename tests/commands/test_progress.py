"""Progress and warnings as commands show them."""

from __future__ import annotations

import re
import warnings
from contextlib import suppress

import pytest

from medusa_export.commands import progress as shown
from medusa_export.commands.progress import shown_progress, shown_warnings
from medusa_export.common.errors import MedusaWarning
from medusa_export.common.progress import Progress, Task


def test_a_log_has_a_line_per_report_and_one_for_a_finished_count(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(quiet=False) as on_progress:
        on_progress(Progress("tracing"))
        task = Task("answering", 3, on_progress, done=1, unit="tokens")
        for _ in range(2):
            task.add(10)
            task.finish_piece()
        task.reach(9)  # no second line at the end
    lines = re.sub(r"\[ +[\d.]+ s\]", "[s]", capsys.readouterr().err).splitlines()
    assert lines[:2] == ["[s] starting", "[s] tracing"]
    assert re.fullmatch(r"answering: 3 of 3, [\d,]+ tokens/s, 0:00:00 left", lines[2])
    assert lines[3:] == ["[s] done"]


def test_a_long_count_has_lines_in_between(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "_PAUSE", 0.0)
    with shown_progress(quiet=False) as on_progress:
        Task("answering", 2, on_progress).finish_piece()
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "answering: 0 of 2, ? left"
    assert lines[2].startswith("answering: 1 of 2, 0:00:0")


def test_a_terminal_has_a_bar_that_goes_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with suppress(KeyboardInterrupt), shown_progress(quiet=False) as on_progress:
        Task("answering", 2, on_progress).finish_piece()
        on_progress(Progress("a line above the bar"))
        raise KeyboardInterrupt
    output = capsys.readouterr().err
    assert "answering" in output
    assert "a line above the bar" in output
    assert "done" not in output


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(quiet=True) as on_progress:
        on_progress(Progress("tracing"))
    assert capsys.readouterr().err == ""


def test_warnings_of_the_package_are_one_line_in_the_words_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as others, shown_warnings(str.upper):
        for _ in range(2):
            warnings.warn("the end tokens disagree", MedusaWarning, stacklevel=1)
        warnings.warn("of another package", UserWarning, stacklevel=1)
    assert [str(other.message) for other in others] == ["of another package"]
    assert capsys.readouterr().err == "warning: THE END TOKENS DISAGREE\n" * 2

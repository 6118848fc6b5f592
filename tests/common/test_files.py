"""Files appear whole, where they were asked for, or not at all."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from medusa_export.cli import main
from medusa_export.common.errors import ExportError, OutputError
from medusa_export.common.files import atomic_folder, check_files, check_target, write_text


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    for text in ("one", "two"):
        write_text(tmp_path / "file", text)
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / text).write_text(text)
        assert (tmp_path / "disk" / "file").read_text() == text
        assert [path.name for path in (tmp_path / "disk" / "folder").iterdir()] == [text]
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder"))
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"file", "folder"}
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "file", "folder"}


def test_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="can't be written"):
        write_text(Path(), "text")
    for here in (Path(), tmp_path, Path(".."), tmp_path.parent):
        with pytest.raises(ExportError, match="holds the working directory"):
            check_target(here, replace_existing=True)


@pytest.mark.parametrize("replaces", [False, True])
def test_of_two_processes_that_write_one_folder_one_wins(tmp_path: Path, replaces: bool) -> None:
    target = tmp_path / "bundle"
    for owner in ("first", "second"):
        with contextlib.ExitStack() as stack:
            if owner == "second" and not replaces:
                stack.enter_context(pytest.raises(OSError, match="another process has written to it"))
            folder = stack.enter_context(atomic_folder(target, replace_existing=replaces))
            (folder / owner).touch()
    assert [path.name for path in target.iterdir()] == ["second" if replaces else "first"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_can_not_be_moved_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def fails(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("no")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no"), atomic_folder(target) as folder:
        (folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_can_not_be_made_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file is a file: give another folder for the engine"):
        check_target(tmp_path / "file" / "a" / "b", replace_existing=False, noun="engine")
    with pytest.raises(ExportError, match="is a mount point, which a finished bundle can't replace"):
        check_target(Path("/dev"), replace_existing=True)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write to every folder
    with pytest.raises(ExportError, match="this user can't write to"):
        check_target(tmp_path / "new" / "bundle", replace_existing=False)
    check_target(Path("/tmp/new/bundle"), replace_existing=False)  # nothing is written


def test_a_file_that_can_not_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    check_files(None, tmp_path / "file", tmp_path / "new" / "a.json", Path("/dev/null"))
    with pytest.raises(OutputError, match="it is a folder"):
        check_files(tmp_path)
    with pytest.raises(OutputError, match="file: it is a file"):
        check_files(None, tmp_path / "file" / "a.json")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write to every folder
    with pytest.raises(OutputError, match="this user can't write to it"):
        check_files(tmp_path / "a.json")


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    code = """
from pathlib import Path
from medusa_export.common.files import write_text
write_text(Path("/dev/stdout"), "text")
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == "text"
    with (tmp_path / "log").open("w") as log:
        subprocess.run(command, stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize(("mode", "kept"), [("a", "a line of before\n"), ("w", "")])
def test_what_a_stream_was_redirected_to_loses_nothing(tmp_path: Path, mode: str, kept: str) -> None:
    (tmp_path / "log").write_text("a line of before\n")
    code = (
        "from pathlib import Path; from medusa_export.common.files import write_text\n"
        "print('first'); write_text(Path('/dev/stdout'), 'text\\n'); print('last')"
    )
    with (tmp_path / "log").open(mode) as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == f"{kept}first\ntext\nlast\n"


def test_a_plot_goes_to_a_stream_too(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"before")
    code = (
        "from pathlib import Path; from medusa_export.common.files import atomic_file\n"
        "with atomic_file(Path('/dev/stdout')) as path: path.open('wb').write(b'image')"
    )
    with (tmp_path / "log").open("ab") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_bytes() == b"beforeimage"


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target in (tmp_path / ("n" * 300), tmp_path / "loop", Path("/dev/full")):
        with pytest.raises(OutputError, match=f"{target} can't be written"):
            write_text(target, "text")


def test_the_systems_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "medusa.json")

    monkeypatch.setattr("medusa_runtime.bundles.bundle.Bundle.load", load)
    result = CliRunner().invoke(main, ["inspect", "bundle"])
    assert result.exit_code == 1
    assert result.output.splitlines() == ["error: [Errno 13] Permission denied: 'medusa.json'."]

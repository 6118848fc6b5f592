"""The model repository that ``medusa-export triton`` writes. ``test_triton.py`` runs it in a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_export import ExportError, OptionError, write_triton_repository
from medusa_runtime import Bundle, BundleError
from support.cli import run


def test_a_model_holds_a_link_to_its_bundle_or_a_copy(tiny_bundle: Bundle, tmp_path: Path) -> None:
    linked = write_triton_repository(tiny_bundle.folder, tmp_path / "models", name="linked")
    assert (linked / "1" / "bundle").readlink() == tiny_bundle.folder
    copied = write_triton_repository(tiny_bundle.folder, tmp_path / "models", name="copied", copy=True, rows=7)
    assert not (copied / "1" / "bundle").is_symlink()
    assert Bundle.load(copied / "1" / "bundle").tree == tiny_bundle.tree
    assert '{ key: "rows", value: { string_value: "7" } }' in (copied / "config.pbtxt").read_text()
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["copied", "linked"]


def test_what_is_there_is_kept_unless_it_may_be_replaced(tiny_bundle: Bundle, tmp_path: Path) -> None:
    write_triton_repository(tiny_bundle.folder, tmp_path, name="tiny")
    with pytest.raises(ExportError, match=r"There is a model at .*/tiny already"):
        write_triton_repository(tiny_bundle.folder, tmp_path, name="tiny")
    model = write_triton_repository(tiny_bundle.folder, tmp_path, name="tiny", rows=9, overwrite=True)
    assert '"9"' in (model / "config.pbtxt").read_text()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(ExportError, match="holds other files and no model"):
        write_triton_repository(tiny_bundle.folder, tmp_path, name="notes", overwrite=True)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b"])
def test_a_name_must_be_that_of_a_folder(tiny_bundle: Bundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="use letters, digits"):
        write_triton_repository(tiny_bundle.folder, tmp_path, name=name)


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="There is no bundle at"):
        write_triton_repository(tmp_path / "nothing", tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_command_prints_the_folder(tiny_bundle: Bundle, tmp_path: Path) -> None:
    code, output = run("triton", tiny_bundle.folder, "-o", tmp_path, "--name", "tiny", "--copy", "--quiet")
    assert (code, output) == (0, f"{tmp_path / 'tiny'}\n")
    assert not (tmp_path / "tiny" / "1" / "bundle").is_symlink()

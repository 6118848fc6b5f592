"""Registries: members that are registered, and members of installed packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_export.common.errors import ExtensionError
from medusa_export.common.registry import Registry

GROUP = "medusa_export.test_colours"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with two entry points, of which one is broken."""
    (tmp_path / "paint.py").write_text("BLUE = 'a blue of the package'\n")
    info = tmp_path / "paint-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paint\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nblue = paint:BLUE\ngreen = paint:GREEN\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_members_are_registered_or_installed() -> None:
    colours: Registry[str] = Registry("colour", GROUP)
    assert colours.register("red", "a red") == "a red"
    assert colours.names == ["blue", "green", "red"]
    assert colours.get("red") == "a red"
    assert colours.get("blue") == "a blue of the package"
    with pytest.raises(ExtensionError, match="The colour 'green' can't be loaded from paint:GREEN: AttributeError"):
        colours.get("green")
    with pytest.raises(ExtensionError, match="no colour named 'pink'; there are: blue, green, red"):
        colours.get("pink")


def test_a_name_is_given_once() -> None:
    colours: Registry[object] = Registry("colour", GROUP)
    red = colours.register("red", object())
    assert colours.register("red", red) is red  # such as by a module that is run again
    with pytest.raises(ExtensionError, match="already a colour named 'red': choose another name"):
        colours.register("red", object())

"""The wheelhouse: what is collected, how it is packed in parts, and how parts are joined as they arrive."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from support.script import load_script

wheelhouse: Any = load_script("wheelhouse")


def test_versions_are_read_from_a_list_of_pip() -> None:
    text = "torch==2.11.0+cu130\nPyYAML==6.0.3\nmine @ file:///src\n-e git+https://x\nnumpy == 2.5.2\n"
    assert wheelhouse.listed(text) == {
        "torch": Version("2.11.0+cu130"), "pyyaml": Version("6.0.3"), "numpy": Version("2.5.2")
    }  # fmt: skip


def test_extras_of_the_project_are_followed() -> None:
    names = {requirement.name for requirement in wheelhouse.own_requirements(["train"])}
    assert {"peft", "torch", "numpy", "msgspec"} <= names
    assert "medusa-export" not in names
    with pytest.raises(SystemExit, match="no extra 'nothing': choose some of "):
        wheelhouse.own_requirements(["nothing"])


def wheel(folder: Path, name: str, version: str, *needs: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A wheelhouse for a machine with two packages, whose downloads come from a folder."""
    source = tmp_path / "source"
    wheel(source, "first", "2.0", "second>=1", 'other>=1; python_version < "3.12"', 'third[more]>=1; extra == "deep"')
    wheel(source, "second", "1.5")
    wheel(source, "third", "1.0", 'fourth; extra == "more"')
    wheel(source, "fourth", "1.0")
    has = {"second": Version("1.1"), "first": Version("1.0")}
    made = wheelhouse.Wheelhouse(wheelhouse.Target("3.12", "x86_64", has), tmp_path / "wheels", {})
    monkeypatch.setattr(type(made), "_downloaded", lambda _, name, wanted: next(source.glob(f"{name}-*.whl")))
    return made


def test_only_what_the_machine_lacks_is_collected(house: Any) -> None:
    house.add(Requirement("first>=2"))  # an older one is there; what it needs is
    assert set(house.wheels) == {"first"}
    assert house.kept == {"second 1.1"}
    house.add(Requirement("first[deep]"))
    assert set(house.wheels) == {"first", "third", "fourth"}
    with pytest.raises(SystemExit, match=r"first<2 is needed, but first 2.0 was collected"):
        house.add(Requirement("first<2"))


def joined(folder: Path) -> subprocess.CompletedProcess[str]:
    script = next(folder.glob("part-*/join.py"))
    return subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)


def test_parts_are_joined_as_they_arrive(tmp_path: Path) -> None:
    files = {"small.whl": b"s" * 300, "large.whl": bytes(range(256)) * 12, "exact.whl": b"e" * 1000, "none": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    packed, arrived = tmp_path / "packed", tmp_path / "arrived"
    packed.mkdir()
    count = wheelhouse.pack([tmp_path / name for name in files], packed, 1000)
    assert count == len(list(packed.glob("part-*")))
    for part in packed.glob("part-*"):
        assert sum(path.stat().st_size for path in part.glob("*.0*")) <= 1000
    for number in range(count, 0, -1):  # the last part first
        outcome = joined(arrived) if number < count else None
        assert outcome is None or (outcome.returncode == 4 and f"part-{number:02}" in outcome.stderr)
        shutil.copytree(packed / f"part-{number:02}", arrived / f"part-{number:02}")
    assert joined(arrived).returncode == 0
    assert {path.name: path.read_bytes() for path in (arrived / "files").iterdir()} == files
    shutil.rmtree(arrived / "part-01")
    assert joined(arrived).returncode == 0  # whole files need no parts
    (arrived / "files/small.whl").write_bytes(b"damaged")
    assert joined(arrived).returncode == 4
    manifest = json.loads((arrived / "part-02/manifest.json").read_text())
    assert manifest["parts"] == count

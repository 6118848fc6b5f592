"""Collects the packages that a machine without a network lacks, in parts that can be carried one by one.

The machine says what it has: ``pip list --format=freeze``. A package that is there in a version that will do is not
collected, and neither is what it needs. All others are, with what they need, as wheels for that machine's Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
MANIFEST, JOIN = "manifest.json", "join.py"
# Oldest first: pip prefers the platforms that it is given first, and older ones fit more machines.
_GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)
_NAME = "medusa-export"


@dataclass(frozen=True)
class Target:
    """The machine to collect for.

    Attributes:
        python: Its Python, such as ``3.12``.
        machine: Its processor, as ``uname -m`` says it.
        has: The versions of its packages, by canonical name.
    """

    python: str
    machine: str
    has: Mapping[str, Version]

    @property
    def environment(self) -> dict[str, str]:
        """Values for the markers of requirements."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": self.machine,
            "os_name": "posix",
        }

    @property
    def pip_options(self) -> list[str]:
        """Options that make pip download for this machine."""
        tags = [f"manylinux_2_{minor}_{self.machine}" for minor in _GLIBC]
        tags.insert(1, f"manylinux2014_{self.machine}")
        platforms = [option for tag in tags for option in ("--platform", tag)]
        return ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python, *platforms]


@dataclass
class Wheelhouse:
    """Wheels that a machine lacks.

    Args:
        target: The machine.
        folder: The folder to download to.
        pins: The versions to prefer, by canonical name.

    Attributes:
        wheels: The wheels, by canonical name of their package.
        kept: The packages that the machine has and that will do, as ``name version``.
    """

    target: Target
    folder: Path
    pins: Mapping[str, Version]
    wheels: dict[str, Path] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    _done: set[tuple[str, str]] = field(default_factory=set)

    def add(self, requirement: Requirement) -> None:
        """Collects a package and what it needs, unless the machine has it.

        Raises:
            SystemExit: There is no wheel of it for this machine, or two requirements contradict each other.
        """
        name = canonicalize_name(requirement.name)
        there = self.target.has.get(name)
        if there is not None and name not in self.wheels and _fits(requirement, there):
            self.kept.add(f"{name} {there}")
            return
        if name in self.wheels:
            found = _version_of(self.wheels[name])
            if not _fits(requirement, found):
                raise SystemExit(f"{requirement} is needed, but {name} {found} was collected for another package.")
        else:
            self.wheels[name] = self._downloaded(name, requirement)
        for extra in ("", *requirement.extras):
            if (name, extra) in self._done:
                continue
            self._done.add((name, extra))
            for needed in _requirements(self.wheels[name]):
                if _applies(needed, self.target, extra):
                    self.add(needed)

    def _downloaded(self, name: str, requirement: Requirement) -> Path:
        pinned = self.pins.get(name)
        wanted = (
            f"{name}=={pinned}"
            if pinned is not None and _fits(requirement, pinned)
            else f"{name}{requirement.specifier}"
        )
        into = self.folder / name
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += [*self.target.pip_options, "--dest", str(into), wanted]
        if subprocess.run(command, check=False).returncode:  # noqa: S603  # pip's own words say why
            raise SystemExit(f"There is no wheel of {wanted} for Python {self.target.python} on {self.target.machine}.")
        return next(into.glob("*.whl"))


def _fits(requirement: Requirement, version: Version) -> bool:
    return requirement.specifier.contains(version, prereleases=True)


def _version_of(wheel: Path) -> Version:
    return Version(wheel.name.split("-")[1])


def _requirements(wheel: Path) -> Iterator[Requirement]:
    """Reads the requirements of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    return map(Requirement, metadata.get_all("Requires-Dist") or ())


def _applies(requirement: Requirement, target: Target, extra: str) -> bool:
    """Returns True if a machine needs it, for the package itself (``extra`` is empty) or for an extra."""
    if requirement.marker is None:
        return not extra
    needed = requirement.marker.evaluate({**target.environment, "extra": extra})
    return needed and (not extra or not requirement.marker.evaluate({**target.environment, "extra": ""}))


def own_requirements(extras: Iterable[str]) -> list[Requirement]:
    """Reads the requirements of this project, with extras; extras of its own are followed.

    Raises:
        SystemExit: There is no extra of a name.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, optional = [*map(Requirement, project["dependencies"])], project["optional-dependencies"]
    for extra in extras:
        if extra not in optional:
            raise SystemExit(f"There is no extra {extra!r}: choose some of {', '.join(optional)}.")
        for requirement in map(Requirement, optional[extra]):
            if canonicalize_name(requirement.name) == _NAME:
                found += own_requirements(sorted(requirement.extras))
            else:
                found.append(requirement)
    return found


def listed(text: str) -> dict[str, Version]:
    """The versions in a list such as that of ``pip list --format=freeze``. Lines of other kinds are left out."""
    pairs = re.findall(r"^([\w.-]+)\s*==\s*(\S+)\s*$", text, flags=re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def pack(files: Iterable[Path], folder: Path, size: int) -> int:
    """Puts files into folders ``part-01``, ``part-02`` and so on, none of them larger than ``size`` bytes.

    A file that doesn't fit is split. Each part holds the list of all files and the script that joins them.

    Args:
        files: The files; their names differ.
        folder: The folder for the parts. Parts of an earlier run are removed.
        size: The most bytes of a part.

    Returns:
        The number of parts.
    """
    for old in folder.glob("part-*"):
        shutil.rmtree(old)
    described, room, number = [], 0, 0
    for file in sorted(files, key=lambda path: path.stat().st_size):
        pieces, whole = [], hashlib.sha256()
        with file.open("rb") as source:
            left = file.stat().st_size
            while left:
                if room == 0 or (room < left and left <= size and not pieces):  # whole files stay whole where they fit
                    number, room = number + 1, size
                data = source.read(min(room, left))
                piece = folder / f"part-{number:02}" / f"{file.name}.{len(pieces):03}"
                piece.parent.mkdir(parents=True, exist_ok=True)
                piece.write_bytes(data)
                whole.update(data)
                pieces.append(
                    {"part": piece.parent.name, "name": piece.name, "sha256": hashlib.sha256(data).hexdigest()}
                )
                left, room = left - len(data), room - len(data)
        described.append(
            {"name": file.name, "size": file.stat().st_size, "sha256": whole.hexdigest(), "pieces": pieces}
        )
    manifest = json.dumps({"parts": number, "files": described}, indent=1) + "\n"
    for part in range(1, number + 1):
        (folder / f"part-{part:02}" / MANIFEST).write_text(manifest, encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name("wheelhouse_join.py"), folder / f"part-{part:02}" / JOIN)
    return number


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give one such as 56M")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def main() -> None:
    """Collects wheels and packs them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder for the parts")
    parser.add_argument("--python", default="3.12", help="the machine's Python")
    parser.add_argument("--machine", default="x86_64", help="its processor, as `uname -m` says it")
    parser.add_argument("--have", type=Path, help="its list of packages, by `pip list --format=freeze`")
    parser.add_argument("--extras", default="export,train,gpu", help="the extras of this project that it is to run")
    parser.add_argument("--with", dest="more", type=Path, action="append", default=[], help="another file to carry")
    parser.add_argument("--parts", type=_bytes, default=_bytes("48M"), help="the largest size of a part, such as 56M")
    options = parser.parse_args()
    has = listed(options.have.read_text(encoding="utf-8")) if options.have else {}
    pins = listed((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    house = Wheelhouse(Target(options.python, options.machine, has), options.folder / "wheels", pins)
    for requirement in own_requirements(word for word in options.extras.split(",") if word):
        if requirement.marker is None or requirement.marker.evaluate(house.target.environment):
            house.add(requirement)
    count = pack([*house.wheels.values(), *options.more], options.folder, options.parts)
    for name, wheel in sorted(house.wheels.items()):
        print(f"{wheel.stat().st_size / 2**20:8.1f} MiB  {name} {_version_of(wheel)}")
    print(f"{len(house.wheels)} wheels in {count} parts; {len(house.kept)} packages are there and will do")


if __name__ == "__main__":
    main()

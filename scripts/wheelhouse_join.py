"""Joins the parts of a wheelhouse that have arrived, and says what is missing.

Usage: ``python join.py FOLDER``: the folder holds ``part-01`` and so on. Files appear in ``FOLDER/files``. Run it after
each part if you like: files that are whole already are left alone. It needs nothing but Python. The exit code is 4
while parts are missing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

INCOMPLETE = 4


def main() -> int:
    """Joins what can be joined."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    found = next(iter(sorted(folder.glob("part-*/manifest.json"))), None)
    if found is None:
        print(f"{folder} holds no part: carry one there first.", file=sys.stderr)
        return INCOMPLETE
    manifest = json.loads(found.read_text(encoding="utf-8"))
    target = folder / "files"
    target.mkdir(exist_ok=True)
    missing: set[str] = set()
    for file in manifest["files"]:
        missing |= join(file, folder, target)
    if missing:
        print(f"missing, of {manifest['parts']} parts: {', '.join(sorted(missing))}", file=sys.stderr)
        return INCOMPLETE
    print(f"all {len(manifest['files'])} files are in {target}")
    return 0


def join(file: dict[str, Any], folder: Path, target: Path) -> set[str]:
    """Joins one file, if all its pieces are there.

    Returns:
        The parts that are missing or damaged.
    """
    whole = target / file["name"]
    if whole.exists() and whole.stat().st_size == file["size"] and digest(whole) == file["sha256"]:
        return set()
    places = [(piece, folder / piece["part"] / piece["name"]) for piece in file["pieces"]]
    bad = {piece["part"] for piece, path in places if not path.exists() or digest(path) != piece["sha256"]}
    if bad:
        return bad
    partial = whole.with_name(f".{whole.name}.partial")
    with partial.open("wb") as output:
        for _, path in places:
            output.write(path.read_bytes())
    partial.replace(whole)
    return set()


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())

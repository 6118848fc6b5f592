"""What a job was asked for, kept in its folder: it goes on only under the settings that it began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medusa_export.common.errors import SettingsError
from medusa_export.common.files import write_text


def begin(path: Path, asked: Mapping[str, Any], *, anew: bool = False) -> None:
    """Writes the settings of a job, or holds them against those that it began with.

    Args:
        path: Where they are kept, in the job's folder.
        asked: Settings by name, as JSON knows them.
        anew: Nothing there depends on any others yet, so they are written whatever they were.

    Raises:
        SettingsError: They are others, or can't be read.
        OutputError: They can't be written.
    """
    if anew or not path.is_file():
        packages = ("medusa-export", "torch", "transformers", "tokenizers")
        made_by = {package: version(package) for package in packages}
        write_text(path, json.dumps({"settings": asked, "made_by": made_by}, indent=1) + "\n")
        return
    known = read_settings(path)["settings"]
    name = next((name for name, value in asked.items() if known.get(name) != value), None)
    if name is not None:
        raise SettingsError(
            f"{path.parent} was begun with {name} = {known.get(name)!r}, not {asked[name]!r}: go on with the same "
            "settings, or give another folder."
        )


def read_settings(path: Path) -> dict[str, Any]:
    """What ``begin`` wrote, and what the job has added since.

    Raises:
        SettingsError: It is missing or damaged.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["settings"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(f"{path} can't be read ({error}): is {path.parent} the folder of such a job?") from error
    return data


def note(path: Path, **facts: Any) -> None:
    """Adds to what ``begin`` wrote what the job has found out since.

    Args:
        path: Where it is kept.
        facts: By name, as JSON knows them.

    Raises:
        SettingsError: It is missing or damaged.
        OutputError: It can't be written.
    """
    known = read_settings(path)
    if any(known.get(name) != value for name, value in facts.items()):
        write_text(path, json.dumps(known | facts, indent=1) + "\n")

"""The settings of a job, kept in its folder. A job continues only with the settings that it began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medusa_export.common.errors import SettingsError
from medusa_export.common.files import write_text


def begin(path: Path, asked: Mapping[str, Any], *, restart: bool = False) -> None:
    """Writes the settings of a new job, or compares them with those that the job began with.

    Args:
        path: File in the job's folder that keeps the settings.
        asked: The settings by name, as JSON values.
        restart: True to replace settings that are there. The caller knows that no file depends on them yet.

    Raises:
        SettingsError: The job began with other settings, or its settings can't be read.
        OutputError: The settings can't be written.
    """
    if restart or not path.is_file():
        packages = ("medusa-export", "torch", "transformers", "tokenizers")
        made_by = {package: version(package) for package in packages}
        write_text(path, json.dumps({"settings": asked, "made_by": made_by}, indent=1) + "\n")
        return
    known = read_settings(path)["settings"]
    name = next((name for name, value in asked.items() if known.get(name) != value), None)
    if name is not None:
        raise SettingsError(
            f"{path.parent} was begun with {name} = {known.get(name)!r}, not {asked[name]!r}: continue with the same "
            "settings, or give another folder."
        )


def read_settings(path: Path) -> dict[str, Any]:
    """The file that ``begin`` wrote, with the facts that the job has added.

    Raises:
        SettingsError: The file is missing or damaged.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["settings"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(f"{path} can't be read ({error}): is {path.parent} the folder of such a job?") from error
    return data


def note(path: Path, **facts: Any) -> None:
    """Adds facts about a job to the file that ``begin`` wrote.

    Args:
        path: The file.
        facts: The facts by name, as JSON values.

    Raises:
        SettingsError: The file is missing or damaged.
        OutputError: The file can't be written.
    """
    known = read_settings(path)
    if any(known.get(name) != value for name, value in facts.items()):
        write_text(path, json.dumps(known | facts, indent=1) + "\n")

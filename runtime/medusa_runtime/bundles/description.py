"""Descriptions: the JSON file that says what a folder holds, ``medusa.json`` or ``engine.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from medusa_runtime.bundles.contract import CONTRACT_VERSION
from medusa_runtime.bundles.json_file import parse_json
from medusa_runtime.bundles.listed_folder import FileFacts, ListedFolder, read_file
from medusa_runtime.errors import BundleError

T = TypeVar("T")

# Inputs and outputs take most of a description: about 200 bytes for each of the two caches of a layer.
MAX_DESCRIPTION_BYTES = 2**22


class _Versioned(msgspec.Struct):
    """The contract version of a description. It is read first, as other versions may have other keys."""

    contract_version: Annotated[int, Meta(ge=1)]


def read_description(
    folder: Path, name: str, schema: type[T], *, noun: str, oldest: int = 1, remedy: str, check_digests: bool
) -> T | None:
    """Reads the description of a folder; None if the folder has none.

    If digests are checked, the description may be a link that leads outside the folder: the caller trusts it.

    Args:
        folder: The folder.
        name: File name of the description.
        schema: The schema of its JSON.
        noun: The name of this kind of folder, for messages.
        oldest: The oldest contract version that this runtime reads.
        remedy: A sentence on what to do about a description that can't be used.
        check_digests: True if the folder's files are compared with their digests.

    Raises:
        BundleError: The file can't be read, is larger than any description, breaks the schema, or follows a contract
            version that this runtime doesn't read.
    """
    where = folder / name
    if not check_digests:
        data = ListedFolder(folder).read(name, at_most=MAX_DESCRIPTION_BYTES)
    else:
        data = read_file(where, at_most=MAX_DESCRIPTION_BYTES) if os.path.lexists(where) else None
    if data is None:
        return None
    version = parse_json(data, _Versioned, where, remedy=remedy).contract_version
    if not oldest <= version <= CONTRACT_VERSION:
        known = f"versions {oldest} to {CONTRACT_VERSION}"
        raise BundleError(
            f"The {noun} {folder} follows contract version {version}, but this runtime knows {known}. {remedy}"
            f"{' Or update medusa-export.' if version > CONTRACT_VERSION else ''}"
        )
    return parse_json(data, schema, where, remedy=remedy)


def description_text(data: Mapping[str, Any], files: Mapping[str, FileFacts]) -> str:
    """The JSON text of a folder's description.

    Args:
        data: The description's own keys and values.
        files: Size and digest of each file that belongs to the folder, by name.
    """
    table = {name: asdict(facts) for name, facts in sorted(files.items())}
    return json.dumps({"contract_version": CONTRACT_VERSION, **data, "files": table}, indent=1) + "\n"

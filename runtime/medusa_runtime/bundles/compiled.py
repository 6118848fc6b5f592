"""A compiled engine: the folder that ``medusa-export trt`` writes, described by its ``engine.json``.

Beside the engine lie ``medusa.json`` and the tokenizer of the bundle that it was built from, so that the folder is
all that a service needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from medusa_runtime.bundles.bundle import (
    DESCRIPTION,
    ENGINE_DESCRIPTION,
    Bundle,
    Versioned,
    description_text,
    read_description,
)
from medusa_runtime.bundles.contract import CONTRACT_VERSION
from medusa_runtime.bundles.json_file import Count, Name, parse_json
from medusa_runtime.bundles.listed_folder import FileFacts, FileTable, ListedFolder
from medusa_runtime.bundles.slots import SlotLayout
from medusa_runtime.errors import BundleError

ENGINE = "model.engine"
REBUILD = "Build it again with 'medusa-export trt'."

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
# Least, usual, most.
Range = tuple[Count, Count, Count]


@dataclass(frozen=True)
class EngineLimits:
    """What an engine was built to hold.

    Attributes:
        max_batch: Rows.
        capacity: C, the slots per row of its caches.
        max_prefill: S of the longest chunk of a prompt.
    """

    max_batch: Size
    capacity: Size
    max_prefill: Size

    def longest_sequence(self, tree_size: int, tree_depth: int) -> int:
        """Tokens of prompt and answer for which a tree of this size finds room to the end.

        The last step begins with at most two tokens less in the cache (docs/contract.md: Slots).
        """
        return SlotLayout(tree_depth).longest_sequence(self.capacity, tree_size)


@dataclass(frozen=True)
class Profile:
    """A range of shapes that the engine was optimised for: least, usual, most.

    Attributes:
        name: ``decode`` or ``prefill``.
        batch: Of B.
        sequence: Of S.
        draws: Of W, the numbers that a row samples with.
    """

    name: Name
    batch: Range
    sequence: Range
    draws: Range = (0, 0, 0)


@dataclass(frozen=True)
class CompiledEngine:
    """An engine's description, and where it lies.

    Attributes:
        folder: The folder.
        flavor: Which TensorRT built it.
        version: Of that library.
        targets: GPU architectures that it runs on, such as sm89; the one of the GPU that it was built on otherwise.
        bundle_sha256: The digest of the bundle's ``medusa.json``, which holds those of all its files.
        limits: What it holds.
        profiles: In the order of the engine's optimisation profiles.
        layers: Layers of the parsed network by type.
        opt_level: The builder's optimisation level.
        build_seconds: How long the builder took.
        files: Digests of the files in the folder.
    """

    folder: Path
    flavor: str
    version: str
    targets: tuple[str, ...]
    bundle_sha256: str
    limits: EngineLimits
    profiles: tuple[Profile, ...]
    layers: Mapping[str, int] = field(default_factory=dict)
    opt_level: int = 0
    build_seconds: float = 0.0
    files: Mapping[str, FileFacts] = field(default_factory=dict)

    @property
    def engine(self) -> Path:
        """The serialised engine."""
        return self.folder / ENGINE

    @property
    def backend_name(self) -> str:
        """What it needs, for people."""
        return f"{self.flavor} {self.version} on {' or '.join(self.targets)}"

    def to_json(self, bundle: Bundle) -> str:
        """The text of ``engine.json``; ``bundle`` is what the engine was built from."""
        data = {
            "flavor": self.flavor,
            "version": self.version,
            "targets": self.targets,
            "limits": asdict(self.limits),
            "longest_sequence": self.limits.longest_sequence(bundle.tree.size, bundle.tree.max_depth),
            "profiles": [asdict(profile) for profile in self.profiles],
            "bundle": {
                "sha256": self.bundle_sha256,
                "files": {name: facts.sha256 for name, facts in sorted(bundle.files.items())},
            },
            "network_layers": {"total": sum(self.layers.values()), **self.layers},
            "opt_level": self.opt_level,
            "build_seconds": round(self.build_seconds, 2),
        }
        return description_text(data, self.files)

    @classmethod
    def load(cls, folder: str | Path, *, check_digests: bool = True) -> CompiledEngine:
        """Reads and checks the description of an engine, its files and that it is of the bundle beside it.

        Args:
            folder: Where ``engine.json`` lies.
            check_digests: Compare every file with its digest, not its size alone.

        Raises:
            BundleError: Something is missing, altered or cut off; of another bundle or contract.
        """
        folder = Path(folder)
        where = folder / ENGINE_DESCRIPTION
        data = read_description(folder, ENGINE_DESCRIPTION, check_digests=check_digests)
        if data is None:
            raise BundleError(f"{folder} holds no engine: it has no {ENGINE_DESCRIPTION}. {REBUILD}")
        version = parse_json(data, Versioned, where, remedy=REBUILD).contract_version
        if version != CONTRACT_VERSION:
            raise BundleError(
                f"The engine {folder} follows contract version {version}, but this runtime serves version "
                f"{CONTRACT_VERSION}. {REBUILD}"
            )
        found = parse_json(data, _Description, where, remedy=REBUILD)
        for name in (ENGINE, DESCRIPTION):
            if name not in found.files:
                raise BundleError(f"{where} lists no {name}. {REBUILD}")
        ListedFolder(folder, found.files, check_digests, ENGINE_DESCRIPTION, "engine").check()
        if FileFacts.of(folder / DESCRIPTION).sha256 != found.bundle.sha256:
            raise BundleError(
                f"The engine in {folder} was built from another bundle than its {DESCRIPTION} describes. {REBUILD}"
            )
        return cls(
            folder=folder,
            flavor=found.flavor,
            version=found.version,
            targets=found.targets,
            bundle_sha256=found.bundle.sha256,
            limits=found.limits,
            profiles=found.profiles,
            layers={name: count for name, count in found.network_layers.items() if name != "total"},
            opt_level=found.opt_level,
            build_seconds=found.build_seconds,
            files=found.files,
        )


class _BuiltFrom(msgspec.Struct):
    sha256: Name


class _Description(msgspec.Struct):
    """The schema of ``engine.json``."""

    flavor: Name
    version: Name
    targets: tuple[Name, ...]
    bundle: _BuiltFrom
    limits: EngineLimits
    profiles: tuple[Profile, ...]
    network_layers: dict[Name, Count]
    opt_level: Count
    build_seconds: float
    files: FileTable


def is_engine(folder: Path) -> bool:
    """Whether a folder holds a compiled engine rather than a bundle."""
    return os.path.lexists(folder / ENGINE_DESCRIPTION)


def require_bundle(folder: Path) -> None:
    """Refuses a folder that holds a compiled engine, where the graph itself is needed.

    Raises:
        BundleError: It does.
    """
    if is_engine(folder):
        raise BundleError(
            f"{folder} holds an engine, which has no graph: give the bundle that it was built from "
            "('medusa-export onnx' wrote it)."
        )

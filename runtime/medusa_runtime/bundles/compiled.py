"""A compiled engine: the folder that ``medusa-export trt`` writes, described by its ``engine.json``.

The folder also holds ``medusa.json`` and the tokenizer of the bundle that the engine was built from: a service needs
nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from medusa_runtime.bundles.bundle import DESCRIPTION, ENGINE_DESCRIPTION, Bundle
from medusa_runtime.bundles.description import description_text, read_description
from medusa_runtime.bundles.json_file import Count, Name
from medusa_runtime.bundles.listed_folder import FileFacts, FileTable, ListedFolder
from medusa_runtime.bundles.slots import SlotLayout
from medusa_runtime.bundles.tree import Tree
from medusa_runtime.errors import BundleError

ENGINE = "model.engine"
# The oldest contract version of an engine that can be read. Older engines list their tensors in ``engine.json``.
_OLDEST = 3
REBUILD = "Build it again with 'medusa-export trt'."

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
# Smallest, usual and largest size.
Range = tuple[Count, Count, Count]


@dataclass(frozen=True)
class EngineLimits:
    """Sizes that an engine was built for.

    Attributes:
        max_batch: The most rows, B.
        capacity: Slots per row, C.
        max_prefill: The most tokens in a chunk of a prompt, S.
    """

    max_batch: Size
    capacity: Size
    max_prefill: Size

    def longest_sequence(self, tree: Tree) -> int:
        """The most tokens of prompt and answer that leave room for a whole tree in every step.

        Before the last step the cache lacks at most two tokens of the whole text (docs/contract.md: Slots).

        Args:
            tree: The bundle's tree.
        """
        return SlotLayout(tree.max_depth).longest_sequence(self.capacity, tree.size)


@dataclass(frozen=True)
class Profile:
    """An optimization profile of the engine: smallest, usual and largest size of each free dimension.

    Attributes:
        name: ``decode`` or ``prefill``.
        batch: Rows, B.
        sequence: New tokens per row, S.
        draws: Tokens for which a row has random numbers, W.
        edits: Tokens per row whose logits may change, P.
        masks: Nodes per row with a mask of allowed tokens, A.
        ranked: Places per row that need the most likely tokens, Q.
    """

    name: Name
    batch: Range
    sequence: Range
    draws: Range = (0, 0, 0)
    edits: Range = (0, 0, 0)
    masks: Range = (0, 0, 0)
    ranked: Range = (0, 0, 0)

    @property
    def sizes(self) -> list[dict[str, int]]:
        """The smallest, the usual and the largest sizes, each by the names of dimensions in the graph's contract."""
        names = [field.name for field in fields(self) if field.name != "name"]
        ranges = [getattr(self, name) for name in names]
        return [dict(zip(names, sizes, strict=True)) for sizes in zip(*ranges, strict=True)]


@dataclass(frozen=True)
class CompiledEngine:
    """A compiled engine's folder, and the content of its description.

    Attributes:
        folder: The folder that holds ``engine.json``.
        flavor: Name of the TensorRT library that built the engine.
        version: Version of that library.
        targets: GPU architectures that the engine runs on, such as sm89. By default that of the GPU it was built on.
        bundle_sha256: Digest of the bundle's ``medusa.json``, which in turn holds the digests of the bundle's files.
        limits: Sizes that the engine was built for.
        profiles: The engine's optimization profiles, in the engine's order.
        layers: Number of layers of the parsed network, by type.
        rewrites: Number of places that each rewrite for TensorRT changed, by the rewrite's name, in the order in which
            they ran; empty in older engines.
        opt_level: The builder's optimization level.
        build_seconds: Seconds that the builder took.
        files: Size and digest of each file in the folder, by name.
    """

    folder: Path
    flavor: str
    version: str
    targets: tuple[str, ...]
    bundle_sha256: str
    limits: EngineLimits
    profiles: tuple[Profile, ...]
    layers: Mapping[str, int] = field(default_factory=dict)
    rewrites: Mapping[str, int] = field(default_factory=dict)
    opt_level: int = 0
    build_seconds: float = 0.0
    files: Mapping[str, FileFacts] = field(default_factory=dict)

    @property
    def engine(self) -> Path:
        """Path of the serialized engine."""
        return self.folder / ENGINE

    @property
    def backend_name(self) -> str:
        """The library and GPUs that the engine needs, in words."""
        return f"{self.flavor} {self.version} on {' or '.join(self.targets)}"

    def to_json(self, bundle: Bundle) -> str:
        """The text of ``engine.json``.

        Args:
            bundle: The bundle that the engine was built from.
        """
        data = {
            "flavor": self.flavor,
            "version": self.version,
            "targets": self.targets,
            "limits": asdict(self.limits),
            "longest_sequence": self.limits.longest_sequence(bundle.tree),
            "profiles": [asdict(profile) for profile in self.profiles],
            "bundle": {
                "sha256": self.bundle_sha256,
                "files": {name: facts.sha256 for name, facts in sorted(bundle.files.items())},
            },
            "network_layers": {"total": sum(self.layers.values()), **self.layers},
            "rewrites": dict(self.rewrites),
            "opt_level": self.opt_level,
            "build_seconds": round(self.build_seconds, 2),
        }
        return description_text(data, self.files)

    @classmethod
    def load(cls, folder: str | Path, *, check_digests: bool = True) -> CompiledEngine:
        """Reads and checks the description of an engine, its files, and that it belongs to the bundle beside it.

        Args:
            folder: The folder that holds ``engine.json``.
            check_digests: True to compare every file with its digest. Sizes are always compared.

        Raises:
            BundleError: A file is missing, altered or cut off, or the engine is of another bundle or contract version.
        """
        folder = Path(folder)
        where = folder / ENGINE_DESCRIPTION
        found = read_description(
            folder,
            ENGINE_DESCRIPTION,
            _Description,
            noun="engine",
            oldest=_OLDEST,
            remedy=REBUILD,
            check_digests=check_digests,
        )
        if found is None:
            raise BundleError(f"{folder} does not hold an engine: it has no {ENGINE_DESCRIPTION}. {REBUILD}")
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
            rewrites=found.rewrites,
            opt_level=found.opt_level,
            build_seconds=found.build_seconds,
            files=found.files,
        )


class _BuiltFrom(msgspec.Struct):
    sha256: Name


class _Description(msgspec.Struct):
    """The schema of ``engine.json``. Older engines lack the keys that have a default here."""

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
    rewrites: dict[Name, Count] = msgspec.field(default_factory=dict)


def is_engine(folder: Path) -> bool:
    """True if a folder holds a compiled engine rather than a bundle."""
    return os.path.lexists(folder / ENGINE_DESCRIPTION)


def require_bundle(folder: Path) -> None:
    """Refuses a folder without graphs.

    Raises:
        BundleError: The folder holds a compiled engine.
    """
    if is_engine(folder):
        raise BundleError(
            f"{folder} holds an engine, which has no graph: give the bundle that it was built from "
            "('medusa-export onnx' wrote it)."
        )

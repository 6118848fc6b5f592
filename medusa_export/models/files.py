"""Find a checkpoint and its weight files, and check that each file is present, readable and complete.

The libraries that read the files later report all kinds of damage in the same or in misleading words. These checks
read the first bytes of each file only.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, is_offline_mode

from medusa_export.common.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
GGUF_MAGIC = b"GGUF"
PICKLES = (".bin", ".pt", ".pth")

# Files in which transformers looks for weights, in its order.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX = ".index.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Kinds of adapters that change the input or the cache of a model, not its weights.
_UNMERGEABLE = ("PROMPT", "P_TUNING", "PREFIX", "ADAPTION", "CPT", "TRAINABLE_TOKENS")
_LFS = b"version https://git-lfs.github.com/spec/"
_HEADER_LENGTH = 8  # bytes that hold the length of a safetensors header


@dataclass(frozen=True)
class Place:
    """The place of a checkpoint: a folder, a single file, or a repository of the hub.

    Attributes:
        source: The path or hub id, as the user gave it.
        folder: The folder; None for a single file and a hub id.
        single_file: The file; None for a folder and a hub id.
    """

    source: str
    folder: Path | None = None
    single_file: Path | None = None

    @property
    def is_remote(self) -> bool:
        """True if the source is a hub id."""
        return self.folder is None and self.single_file is None

    @property
    def name(self) -> str:
        """A name for the model, from the path or hub id."""
        if self.single_file is not None:
            return self.single_file.stem
        if self.folder is None:
            return self.source.rpartition("/")[2]
        folder = self.folder.resolve()
        if folder.parent.name == "snapshots":  # of the hub's cache, whose folders are named models--owner--name
            folder = Path(folder.parent.parent.name.rpartition("--")[2])
        return folder.name or "model"

    def file(self, name: str) -> Path | None:
        """The path of one of its files, downloaded from the hub if need be; None if it has no file of that name.

        Raises:
            OSError: The hub can't be reached, and the file is not in the cache.
        """
        if self.single_file is not None:
            return None
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_symlink() or path.exists() else None
        found = cached_file(self.source, name, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found is not None else None

    def check_reachable(self) -> None:
        """Asks the hub for one file, to find out once, not per file, that it is unreachable. Offline it does nothing.

        Raises:
            OSError: The hub can't be reached, or has no such repository.
        """
        if self.is_remote and not is_offline_mode():
            cached_file(self.source, CONFIG)

    @classmethod
    def of(cls, source: str) -> Place:
        """Finds a checkpoint.

        Raises:
            CheckpointError: There is none, or its file is damaged.
        """
        path = Path(source).expanduser()
        try:
            if path.is_dir():
                return cls(source, folder=path)
            if path.is_symlink() or path.exists():
                check_file(path)
                return cls(source, single_file=path)
        except OSError as e:
            raise CheckpointError(
                f"{source} can't be opened ({e.strerror or e}): make it readable for this user."
            ) from e
        if not is_hub_id(source):
            raise CheckpointError(f"There is no folder {source}: give a model's folder, a .gguf file, or a hub id.")
        return cls(source)


def is_hub_id(source: str) -> bool:
    """True if a text can be the id of a repository on the hub."""
    return source.count("/") == 1 and not source.startswith((".", "~", "/")) and not source.endswith("/")


def check_file(path: Path) -> None:
    """Checks that a file exists, can be read, and has the type that its name says.

    Raises:
        CheckpointError: The message says which of these is not so.
    """
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path} is a link to {path.readlink()}, which is not there: get that file, or restore it."
        )
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, but a file of that name was expected: restore the file.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(200)
    except FileNotFoundError as e:
        raise CheckpointError(f"There is no file {path}: get it, or correct the name.") from e
    except OSError as e:
        raise CheckpointError(f"{path} can't be opened ({e.strerror}): make it readable for this user.") from e
    if not start:
        raise CheckpointError(f"{path} is empty: get it once more.")
    if start.startswith(_LFS):
        raise CheckpointError(
            f"{path} is a pointer of git-lfs, not the file itself: run 'git lfs pull' in its repository."
        )
    if path.suffix == ".safetensors":
        _check_safetensors(path, start, size)
    elif path.suffix in PICKLES and start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} ends too early: get it once more.")
    elif path.suffix.lower() == ".gguf" and not start.startswith(GGUF_MAGIC):
        raise CheckpointError(f"{path} is no GGUF file: its first bytes are not 'GGUF'.")


def _check_safetensors(path: Path, start: bytes, size: int) -> None:
    if len(start) < _HEADER_LENGTH:
        raise CheckpointError(f"{path} ends too early ({size} bytes): get it once more.")
    length = int.from_bytes(start[:_HEADER_LENGTH], "little")
    first = start[_HEADER_LENGTH : _HEADER_LENGTH + 1]
    if first not in (b"{", b""):
        raise CheckpointError(f"{path} is no safetensors file, whatever its name: get it once more.")
    if _HEADER_LENGTH + length > size:
        raise CheckpointError(f"{path} ends too early, within its header: get it once more.")
    with path.open("rb") as file:
        file.seek(_HEADER_LENGTH)
        header = file.read(length)
    try:
        entries = json.loads(header).items()
        ends = [entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"]
        expected = _HEADER_LENGTH + length + max(ends, default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path} has no readable header: get it once more.") from e
    if expected > size:
        raise CheckpointError(f"{path} ends too early: it has {size} of {expected} bytes. Get it once more.")


def check_folder(place: Place) -> None:
    """Checks that a folder or a hub id holds a model that can be loaded as it is.

    Raises:
        CheckpointError: Its configuration is missing or can't be read, or it holds an adapter.
        OSError: The hub can't be reached, or has no such model.
    """
    if place.folder is not None:
        try:
            list(place.folder.iterdir())
        except OSError as e:
            raise CheckpointError(
                f"{place.source} can't be listed ({e.strerror}): make it readable for this user."
            ) from e
    place.check_reachable()
    _check_no_adapter(place)
    if place.folder is None:
        cached_file(place.source, CONFIG)
        return
    config = place.file(CONFIG)
    if config is None:
        raise CheckpointError(_no_config(place.source, place.folder))
    check_file(config)


def _no_config(source: str, folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    gguf = next((name for name in names if name.lower().endswith(".gguf")), None)
    if gguf is not None:
        return f"{source} has no {CONFIG}, but holds {gguf}: give the path of that file."
    other = next((name for name in names if name.lower() == CONFIG), None)
    if other is not None:
        return f"{source} has no {CONFIG}, but holds {other}: rename it."
    if "params.json" in names:
        return (
            f"{source} has no {CONFIG}, but a params.json: it is in its authors' layout. Give the version that is "
            "in Hugging Face's."
        )
    return f"{source} has no {CONFIG}, so it is not a model's folder: give one that transformers can load."


def _check_no_adapter(place: Place) -> None:
    """Refuses an adapter, with or without base weights beside it."""
    file = place.file(ADAPTER_CONFIG)
    weights = [name for name in _ADAPTER_WEIGHTS if place.folder is not None and place.file(name) is not None]
    if file is None and not weights:
        return
    settings = _adapter_settings(file)
    kind = str(settings.get("peft_type") or "").upper()
    base = settings.get("base_model_name_or_path")
    # On the hub a configuration is taken as the sign of a base model: looking for weights would download them.
    has_base = any(place.file(name) is not None for name in ((CONFIG,) if place.is_remote else _WEIGHTS))
    article = ("an " if kind[:1] in tuple("AEIO") else "a ") + kind + " " if kind else "an "
    words = f"{place.source} holds {article}adapter ({ADAPTER_CONFIG if file is not None else weights[0]})"
    words += " beside base weights, which would not be applied." if has_base else ", not a whole model."
    if kind.startswith(_UNMERGEABLE):
        words += " Adapters of this kind can't be merged into weights, so they can't be exported."
    else:
        words += (
            f" Merge it into its base{f', {base},' if base else ''} and give the merged folder: peft."
            f"AutoPeftModelForCausalLM.from_pretrained({place.source!r}).merge_and_unload().save_pretrained('merged')."
        )
    if has_base:
        words += f" To use the base model alone, move {ADAPTER_CONFIG} and the adapter's weights elsewhere."
    raise CheckpointError(words)


def _adapter_settings(file: Path | None) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}  # the adapter is refused all the same
    return settings if isinstance(settings, dict) else {}


def weight_files(place: Place, named: str | None = None) -> list[Path]:
    """The files that hold a checkpoint's weights. For an index, the shards that it names.

    Args:
        place: A folder or a hub id.
        named: The file that the configuration names (``transformers_weights``); None if it names none.

    Raises:
        CheckpointError: There are no weights, or a file is missing or damaged.
    """
    for name in (named,) if named is not None else _WEIGHTS:
        first = place.file(name)
        if first is not None and not first.is_dir():
            check_file(first)
            files = _shards(place, first) if name.endswith(_INDEX) else [first]
            for file in files:
                check_file(file)
            return files
    expected = named or _WEIGHTS[0]
    raise CheckpointError(f"{place.source} holds no weights: expected {expected}{_instead(place.folder)}.")


def _shards(place: Place, index: Path) -> list[Path]:
    names = sorted(set(weight_map(index).values()))
    found = {name: place.file(name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        more = f" and {len(missing) - 1} more of {len(names)} shards" if len(missing) > 1 else ""
        raise CheckpointError(f"{index} names {missing[0]}{more}, not found beside it: get the whole checkpoint.")
    return [path for path in found.values() if path is not None]


def weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor, as an index file says.

    Raises:
        CheckpointError: The file is no index.
    """
    check_file(index)
    try:
        shards = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{index} has no readable weight_map: restore the file.") from e
    for shard in shards.values():
        if not isinstance(shard, str) or not shard or shard.endswith(_INDEX) or not _is_below(shard):
            raise CheckpointError(f"{index} names {shard!r}, which is no file of weights beside it: restore the file.")
    if not shards:
        raise CheckpointError(f"{index} names no weights: restore the file.")
    return shards


def _is_below(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _instead(folder: Path | None) -> str:
    """The end of a sentence that says what a folder holds in place of weights."""
    names = sorted(path.name for path in folder.iterdir()) if folder is not None else []
    for name in names:
        wanted = next((known for known in _WEIGHTS if known == name.lower()), None)
        if wanted is not None:
            return f", but {name} is a folder" if name == wanted else f", but found {name}: rename it to {wanted}"
    others = [name for name in names if name.lower().endswith((".gguf", ".safetensors", ".h5", ".msgpack", *PICKLES))]
    if others:
        return f" or another of {', '.join(_WEIGHTS[1:])}, but found {', '.join(others[:3])}"
    return f" or another of {', '.join(_WEIGHTS[1:])}"

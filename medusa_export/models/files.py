"""Where a checkpoint lies, which of its files hold the weights, and whether each is there, readable and whole.

The libraries that read them later report all kinds of damage in the same words, or in misleading ones. These checks
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

# Where transformers looks for weights, in its order.
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
_HEADER_LENGTH = 8  # bytes before a safetensors header, which say how long it is


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies: in a folder, in a GGUF file, or on the hub.

    Attributes:
        source: As the user gave it.
        folder: The folder; None for a GGUF file and a hub id.
        gguf: The GGUF file; None for a folder and a hub id.
    """

    source: str
    folder: Path | None = None
    gguf: Path | None = None

    @property
    def is_remote(self) -> bool:
        """Whether it is a hub id."""
        return self.folder is None and self.gguf is None

    @property
    def arguments(self) -> dict[str, Any]:
        """What transformers' ``from_pretrained`` methods call it."""
        if self.gguf is not None:
            return {"pretrained_model_name_or_path": str(self.gguf.parent), "gguf_file": self.gguf.name}
        name = self.source if self.folder is None else str(self.folder)
        return {"pretrained_model_name_or_path": name, "gguf_file": None}

    @property
    def name(self) -> str:
        """What to call the model."""
        if self.gguf is not None:
            return self.gguf.stem if self.gguf.suffix.lower() == ".gguf" else self.gguf.name
        if self.folder is None:
            return self.source.rpartition("/")[2]
        folder = self.folder.resolve()
        if folder.parent.name == "snapshots":  # of the hub's cache, whose folders are named models--owner--name
            folder = Path(folder.parent.parent.name.rpartition("--")[2])
        return folder.name or "model"

    def file(self, name: str) -> Path | None:
        """The path of one of its files, fetched from the hub if need be; None where there is none of that name.

        Raises:
            OSError: The hub can't be reached and the file is in no cache.
        """
        if self.gguf is not None:
            return None
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_symlink() or path.exists() else None
        found = cached_file(self.source, name, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found is not None else None

    def check_reachable(self) -> None:
        """Asks the hub once, where it would be asked for one file after another; offline, its cache decides.

        Raises:
            OSError: The hub can't be reached, or has no such repository.
        """
        if self.is_remote and not is_offline_mode():
            cached_file(self.source, CONFIG)  # where the repository has none, this is no error

    @classmethod
    def of(cls, source: str) -> Place:
        """Finds a checkpoint.

        Raises:
            CheckpointError: There is none, or what is there is no checkpoint of a model.
        """
        path = Path(source).expanduser()
        try:
            if path.is_dir():
                place = cls(source, folder=path)
            elif is_gguf(path) and (path.is_symlink() or path.exists()):
                check_file(path)
                place = cls(source, gguf=path)
            elif path.is_symlink() or path.is_file():
                check_file(path)
                raise CheckpointError(
                    f"{source} is a file that is no GGUF: give the folder that holds it and its {CONFIG}, or a GGUF."
                )
            elif path.suffix.lower() == ".gguf":
                raise CheckpointError(f"There is no file {source}: give the path of a GGUF file, a folder or a hub id.")
            elif not is_hub_id(source):
                raise CheckpointError(f"There is no folder {source}: give a model's folder, a .gguf file, or a hub id.")
            else:
                place = cls(source)
        except OSError as e:
            raise CheckpointError(
                f"{source} can't be opened ({e.strerror or e}): make it readable for this user."
            ) from e
        return place


def is_hub_id(source: str) -> bool:
    """Whether a text that names no local file may be the id of a repository on the hub."""
    return source.count("/") == 1 and not source.startswith((".", "~", "/")) and not source.endswith("/")


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF, by its name in any case or by its first bytes."""
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def check_file(path: Path) -> None:
    """Checks that a file is there, can be read, and holds what its name says.

    Raises:
        CheckpointError: It says which of these is not so.
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
    # On the hub its configuration speaks for a base model: to ask for weights would be to fetch them.
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
        return {}  # it is an adapter all the same
    return settings if isinstance(settings, dict) else {}


def weight_files(place: Place, named: str | None = None) -> list[Path]:
    """The files that hold a checkpoint's weights; of an index, the shards that it names.

    Args:
        place: A folder or a hub id.
        named: The file that its configuration names (``transformers_weights``), if it does.

    Raises:
        CheckpointError: There are none, or one is missing or damaged.
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
    """Which shard each tensor is in, by an index.

    Raises:
        CheckpointError: It is no index.
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
    """What a folder holds in place of weights, as the end of a sentence."""
    names = sorted(path.name for path in folder.iterdir()) if folder is not None else []
    for name in names:
        wanted = next((known for known in _WEIGHTS if known == name.lower()), None)
        if wanted is not None:
            return f", but {name} is a folder" if name == wanted else f", but found {name}: rename it to {wanted}"
    others = [name for name in names if name.lower().endswith((".gguf", ".safetensors", ".h5", ".msgpack", *PICKLES))]
    if others:
        return f" or another of {', '.join(_WEIGHTS[1:])}, but found {', '.join(others[:3])}"
    return f" or another of {', '.join(_WEIGHTS[1:])}"

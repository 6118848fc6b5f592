"""Heads on disk: finds and reads files of heads; ``writer`` writes them, ``medusa_files`` lists the formats."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.errors import CheckpointError, ExtensionError
from medusa_export.compat.transformers import quiet_libraries
from medusa_export.heads.architecture import head_architecture
from medusa_export.heads.base import DraftHeads
from medusa_export.heads.loaded import LoadedHeads
from medusa_export.heads.medusa_files import select_heads
from medusa_export.heads.modules import MedusaHeads
from medusa_export.heads.tensors import HeadTensors
from medusa_export.models.contents import Readable, open_contents, open_pickle
from medusa_export.models.files import PICKLES, Place, check_file, is_hub_id, weight_map

# Keys of a safetensors file's metadata, for heads of other architectures than MEDUSA's.
ARCHITECTURE_KEY = "medusa_export.architecture"
CONFIG_KEY = "medusa_export.config"
HEADS_FILE = "medusa_lm_head.safetensors"

# The names that a file of heads may have in a folder; the first that is there is taken.
_FILES = (
    HEADS_FILE,
    "medusa_lm_head.pt",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class StoredHeads:
    """The content of a file of heads.

    Attributes:
        tensors: The tensors of the heads, by name, unread.
        architecture: The name of the head architecture.
        config: The configuration of the heads as the file states it; empty for published formats.
    """

    tensors: Mapping[str, Readable]
    architecture: str = MedusaHeads.architecture
    config: Mapping[str, object] = field(default_factory=dict)


def load_heads(path: str | Path, model: PreTrainedModel) -> DraftHeads:
    """Reads heads and fits them to a base model: in its dtype, in eval mode and without gradients.

    Args:
        path: A file of heads, or a folder or hub id that holds one. Of a merged checkpoint only the heads are read.
        model: The base model that the heads were trained for.

    Raises:
        CheckpointError: The file is missing, damaged, incomplete, of no known format, or made for another model.
    """
    return open_heads(path, model).in_memory()


def open_heads(
    path: str | Path, model: PreTrainedModel, read_lm_head: Callable[[], Tensor] | None = None
) -> LoadedHeads:
    """Loads heads as ``load_heads`` does, but leaves their weights in the file until they are asked for.

    Args:
        path: As for ``load_heads``.
        model: The base model that the heads were trained for.
        read_lm_head: Reads the weight of the base model's output projection; None if it is in the model's memory.

    Returns:
        The heads with placeholders, and the functions that read the weights.

    Raises:
        CheckpointError: As for ``load_heads``.
    """
    file = _heads_file(path)
    stored = _open(file)
    lm_head = model.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear):
        raise CheckpointError("This base model has no linear output projection, so no heads can be fitted to it.")
    try:
        architecture = head_architecture(stored.architecture)
    except ExtensionError as error:
        raise CheckpointError(f"The heads in {file} can't be read. {error}") from error
    tensors = HeadTensors(file, stored.tensors, stored.config)
    opened = architecture.open(tensors, lm_head, read_lm_head or lm_head.weight.detach)
    return opened.prepared(lm_head.weight.dtype)


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of the weights in a file of heads.

    Raises:
        CheckpointError: As for ``load_heads``.
    """
    tensors = _open(_heads_file(path)).tensors
    kind = next((tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point), None)
    if kind is None:
        raise CheckpointError(f"The heads at {path} hold integers only: give weights that are not quantized.")
    return kind


def _heads_file(source: str | Path) -> Path:
    """Finds the file of heads: the path itself, or the first known name in a folder or a repository of the hub."""
    path = Path(source).expanduser()
    try:
        is_folder, is_there = path.is_dir(), path.is_symlink() or path.exists()
    except OSError as e:
        raise CheckpointError(f"{source} can't be opened ({e.strerror or e}): make it readable for this user.") from e
    if is_there and not is_folder:
        check_file(path)
        return path
    if not is_folder and (path.suffix in (".safetensors", *PICKLES) or not is_hub_id(str(source))):
        raise CheckpointError(
            f"There are no heads at {source}: give a file of heads, or a folder or hub id that holds one."
        )
    place = Place(str(source), folder=path if is_folder else None)
    try:
        with quiet_libraries():
            place.check_reachable()
            files = (place.file(name) for name in _FILES)
            file = next((file for file in files if file is not None and not file.is_dir()), None)
    except OSError as e:
        words = " ".join(str(e).split())
        raise CheckpointError(
            f"There are no heads at {source}: it is not a local path, and the hub failed ({words}). Check the name "
            "and the connection, or give a file."
        ) from e
    if file is not None:
        check_file(file)
        return file
    if place.is_remote:
        raise CheckpointError(
            f"There are no heads at {source}: it is not a local path, and on the hub or in its cache there is no "
            f"{HEADS_FILE} or other file of heads by that name. Check the name, or give a file."
        )
    others = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *PICKLES))
    if len(others) == 1:
        check_file(others[0])
        return others[0]
    found = ", ".join(file.name for file in others) or "none of its kind"
    raise CheckpointError(
        f"The folder {path} holds no {HEADS_FILE} or other file of heads with a known name ({found}): give the file."
    )


def _open(file: Path) -> StoredHeads:
    """Finds the heads in a file, or in the shards of an index. The tensors stay unread."""
    if file.name.endswith(".index.json"):
        return StoredHeads(_open_shards(file))
    if file.suffix == ".safetensors":
        return _open_safetensors(file)
    if file.suffix in PICKLES:
        return StoredHeads(_open_pickle(file))
    raise CheckpointError(f"{file} is neither a .safetensors nor a .pt file: give a file of heads in one of the two.")


def _open_shards(index: Path) -> dict[str, Readable]:
    shards = weight_map(index)
    names = select_heads(index, shards)
    tensors: dict[str, Readable] = {}
    for shard in sorted({shards[name] for name in names}):
        file = index.parent / shard
        if not file.exists() and (place := _hub_place(index)) is not None:
            with quiet_libraries():
                file = place.file(shard) or file
        if not (file.is_symlink() or file.exists()):
            raise CheckpointError(f"{index} names the shard {shard}, which is missing: add it to the folder.")
        check_file(file)
        tensors.update(_open(file).tensors)
    for name in names:
        if name not in tensors:
            raise CheckpointError(
                f"{index} places {name} in {shards[name]}, which lacks it: download or copy both again."
            )
    return tensors


def _hub_place(index: Path) -> Place | None:
    """The repository of an index in the hub's cache, to get its other files from; None for an index elsewhere."""
    snapshot = index.parent
    kind, *name = snapshot.parent.parent.name.split("--")
    if snapshot.parent.name != "snapshots" or kind != "models" or not name:
        return None
    return Place("/".join(name))


def _open_safetensors(file: Path) -> StoredHeads:
    try:
        opened = open_contents([file])
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file} is not a whole safetensors file ({e}): download or copy it again.") from e
    architecture = opened.metadata.get(ARCHITECTURE_KEY)
    if architecture is None:
        return StoredHeads({name: opened.tensors[name] for name in select_heads(file, opened.tensors)})
    try:
        config = msgspec.json.decode(opened.metadata.get(CONFIG_KEY, "{}"), type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError) as e:
        raise CheckpointError(f"The configuration of the heads in {file} is not JSON ({e}): write them again.") from e
    return StoredHeads(opened.tensors, architecture, config)


def _open_pickle(file: Path) -> Mapping[str, Readable]:
    try:
        state = open_pickle(file)
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{file} was not loaded, because its pickle asks to run code, which weights_only=True refuses, or is "
            "damaged: if you trust its author, convert it where that is safe, with torch.load(…, weights_only=False) "
            "and safetensors.torch.save_file."
        ) from e
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError, TypeError, AttributeError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f"{file} is not a whole PyTorch file ({reason}): download or copy it again.") from e
    return {name: state[name] for name in select_heads(file, state)}

"""MEDUSA heads on disk: every published format is read; ``head_writer`` writes them.

``{k}`` numbers heads, ``{j}`` residual blocks, n is how many of them a head has:

* v0.1: ``{k}.{j}.linear.weight`` and ``.bias``, ``{k}.{n}.weight``, the head's own projection;
* v2: the same without projections, since the heads share the base model's ``lm_head``;
* merged 1.0 (Medusa-2): either of them behind ``medusa_head.``, among the base model's shards;
* conditioned heads, our own: v0.1 or v2 with ``{k}.0.condition.weight``;
* vLLM: ``blocks.{k}.layers.{j}.weight``, ``lm_heads.{k}.weight`` or one ``lm_head.weight`` for all, and
  ``token_map`` where the draft vocabulary is reduced.

How many heads and blocks there are is read from the tensors: published configs are often wrong about it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.errors import CheckpointError
from medusa_export.heads.modules import HeadsConfig, MedusaHeads
from medusa_export.models.checkpoints import quiet_libraries
from medusa_export.models.files import PICKLES, Place, check_file, is_hub_id, weight_map

HEADS_FILE = "medusa_lm_head.safetensors"

# Where a folder keeps its heads: the first that is there.
_FILES = (
    HEADS_FILE,
    "medusa_lm_head.pt",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_PREFIX = re.compile(r"^medusa_heads?\.")
_BLOCK = re.compile(r"^(?:(\d+)\.(\d+)\.linear|blocks\.(\d+)\.layers\.(\d+))\.(weight|bias)$")
_CONDITION = re.compile(r"^(\d+)\.0\.condition\.weight$")
_PROJECTION = re.compile(r"^(?:(\d+)\.\d+|lm_heads\.(\d+))\.weight$")
_COMMON = "lm_head.weight"
_TOKEN_MAP = "token_map"  # noqa: S105  # no password


def load_heads(path: str | Path, model: PreTrainedModel) -> MedusaHeads:
    """Reads heads and fits them to a base model: in its dtype, in eval mode and without gradients.

    Args:
        path: A file of heads, or a folder or hub id that holds one; also a merged checkpoint, of which only the heads
            are read.
        model: The base model that they were trained for.

    Raises:
        CheckpointError: The file is missing, damaged, incomplete, of no known format, or made for another model.
    """
    file = _heads_file(path)
    tensors = _Tensors(file, _read(file))
    lm_head = model.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear):
        raise CheckpointError("This base model has no linear output projection, so no heads can be fitted to it.")
    return _build(tensors, lm_head).to(dtype=lm_head.weight.dtype).eval().requires_grad_(False)


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of the weights in a file of heads.

    Raises:
        CheckpointError: As for ``load_heads``.
    """
    tensors = _read(_heads_file(path))
    kind = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    if kind is None:
        raise CheckpointError(f"The heads at {path} hold whole numbers only: give weights that are not quantized.")
    return kind


def _heads_file(source: str | Path) -> Path:
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
            f"There are no heads at {source}: it is no local path, and the hub gave nothing ({words}). Check the name "
            "and the connection, or give a file."
        ) from e
    if file is not None:
        check_file(file)
        return file
    if place.is_remote:
        raise CheckpointError(
            f"There are no heads at {source}: it is no local path, and on the hub or in its cache there is no "
            f"{HEADS_FILE} or other file of heads by that name. Check the name, or give a file."
        )
    others = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *PICKLES))
    if len(others) == 1:
        check_file(others[0])
        return others[0]
    found = ", ".join(file.name for file in others) or "none of its kind"
    raise CheckpointError(
        f"The folder {path} holds no {HEADS_FILE} or other file of heads that can be told ({found}): give the file."
    )


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of the heads in a file, or in the shards of an index; the others stay unread."""
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in PICKLES:
        return _read_pickle(file)
    raise CheckpointError(f"{file} is neither a .safetensors nor a .pt file: give a file of heads in one of the two.")


def _read_shards(index: Path) -> dict[str, Tensor]:
    shards = weight_map(index)
    names = _select(index, shards)
    tensors: dict[str, Tensor] = {}
    for shard in sorted({shards[name] for name in names}):
        file = index.parent / shard
        if not file.exists() and (place := _hub_place(index)) is not None:
            with quiet_libraries():
                file = place.file(shard) or file
        if not (file.is_symlink() or file.exists()):
            raise CheckpointError(f"{index} names the shard {shard}, which is not there: get it too.")
        check_file(file)
        tensors.update(_read(file))
    for name in names:
        if name not in tensors:
            raise CheckpointError(f"{index} places {name} in {shards[name]}, which lacks it: get both once more.")
    return tensors


def _hub_place(index: Path) -> Place | None:
    """The repository that an index in the hub's cache came from: its other files may not be here yet."""
    snapshot = index.parent
    kind, *name = snapshot.parent.parent.name.split("--")
    if snapshot.parent.name != "snapshots" or kind != "models" or not name:
        return None
    return Place("/".join(name))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in _select(file, opened.keys())}
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file} is not a whole safetensors file ({e}): get it once more.") from e


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{file} was not loaded, because its pickle asks to run code, which weights_only=True refuses, or is "
            "damaged: if you trust its author, convert it where that is safe, with torch.load(…, weights_only=False) "
            "and safetensors.torch.save_file."
        ) from e
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError, TypeError, AttributeError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f"{file} is not a whole PyTorch file ({reason}): get it once more.") from e
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{file} holds no table of named tensors: save the state_dict of the heads.")
    return {name: state[name] for name in _select(file, state)}


def _select(file: Path, names: Iterable[str]) -> list[str]:
    """The names of the heads' tensors: those behind the prefix of a merged checkpoint, or else all."""
    names = list(names)
    merged = [name for name in names if _PREFIX.match(name)]
    strange = [name for name in merged or names if not _is_known(_PREFIX.sub("", name))]
    if not names:
        raise CheckpointError(f"{file} is empty: give a file that holds heads.")
    if strange:
        raise CheckpointError(
            f"{file} holds {strange[0]}, which belongs to no known format of MEDUSA heads; their tensors have names "
            "like 0.0.linear.weight, medusa_head.0.0.linear.weight or blocks.0.layers.0.weight."
        )
    return merged or names


def _is_known(name: str) -> bool:
    return name in (_COMMON, _TOKEN_MAP) or any(pattern.match(name) for pattern in (_BLOCK, _PROJECTION, _CONDITION))


class _Tensors:
    """The tensors of one set of heads, handed out by name and shape.

    Args:
        file: Where they come from, for messages.
        tensors: As named in the file.
    """

    def __init__(self, file: Path, tensors: dict[str, Tensor]) -> None:
        self.file = file
        self._left = {_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
        vllm = next((name for name in self._left if name.startswith(("blocks.", "lm_heads."))), None)
        other = next((name for name in self._left if name[0].isdigit()), None)
        if vllm and other:
            raise CheckpointError(f"{file} mixes two formats, {vllm} and {other}: keep the tensors of one.")
        self.is_vllm = vllm is not None
        blocks = [match for name in self._left if (match := _BLOCK.match(name))]
        self.projected = {int(m[1] or m[2]) for name in self._left if (m := _PROJECTION.match(name))}
        self.num_heads = max([*(int(match[1] or match[3]) for match in blocks), *self.projected], default=0) + 1
        self.num_layers = max((int(match[2] or match[4]) for match in blocks), default=0) + 1
        self.conditioned = any(_CONDITION.match(name) for name in self._left)
        self.has_biases = any(match[5] == "bias" for match in blocks)

    def block(self, k: int, j: int, size: int) -> tuple[Tensor, Tensor]:
        """Weight [size, size] and bias [size] of a residual block; a format without biases has zeros."""
        name = f"blocks.{k}.layers.{j}" if self.is_vllm else f"{k}.{j}.linear"
        weight = self._take(f"{name}.weight", (size, size))
        bias = self._take(f"{name}.bias", (size,)) if self.has_biases else weight.new_zeros(size)
        return weight, bias

    def condition(self, k: int, size: int) -> Tensor:
        """The weight [size, size] by which the next token's embedding enters a head."""
        return self._take(f"{k}.0.condition.weight", (size, size))

    def projections(self, token_map: Tensor | None, lm_head: nn.Linear) -> list[nn.Parameter] | None:
        """Projections [draft_vocab_size, size], one per head or one for all; None if it is the ``lm_head``."""
        if self._one_for_all is None and self.projected:
            names = [self._projection_name(k) for k in range(self.num_heads)]
            return [nn.Parameter(self._projection(name, token_map, lm_head)) for name in names]
        if self._one_for_all is not None:
            weight = self._projection(self._one_for_all, token_map, lm_head)
        elif token_map is not None:
            weight = lm_head.weight.detach()[token_map]
        else:
            return None
        if token_map is None and torch.equal(weight.to(lm_head.weight.dtype), lm_head.weight):
            return None
        return [nn.Parameter(weight)]

    def token_map(self, vocab_size: int) -> Tensor | None:
        """The base model's token of each draft token, [draft_vocab_size]; None if the vocabulary is not reduced."""
        if _TOKEN_MAP not in self._left:
            return None
        tokens = self._left.pop(_TOKEN_MAP)
        if tokens.ndim != 1 or tokens.is_floating_point() or not 0 < len(tokens) <= vocab_size:
            raise CheckpointError(
                f"The token_map of {self.file} is {list(tokens.shape)} of {tokens.dtype}: expected a list of 1 to "
                f"{vocab_size} token ids."
            )
        tokens = tokens.long()
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if len(outside):
            raise CheckpointError(
                f"The token_map of {self.file} names token {int(outside[0])}, but the base model's go from 0 to "
                f"{vocab_size - 1}: the heads were made for another vocabulary."
            )
        if len(set(tokens.tolist())) != len(tokens):
            raise CheckpointError(f"The token_map of {self.file} names a token twice: each may stand there once.")
        return tokens

    def check_none_left(self) -> None:
        for name in self._left:
            raise CheckpointError(f"{self.file} holds {name}, which has no place beside its other tensors: drop it.")

    @property
    def _one_for_all(self) -> str | None:
        """The one projection of all heads; vLLM also writes it as that of head 0."""
        if _COMMON in self._left:
            return _COMMON
        return "lm_heads.0.weight" if self.is_vllm and self.projected == {0} and self.num_heads > 1 else None

    def _projection_name(self, k: int) -> str:
        return f"lm_heads.{k}.weight" if self.is_vllm else f"{k}.{self.num_layers}.weight"

    def _projection(self, name: str, token_map: Tensor | None, lm_head: nn.Linear) -> Tensor:
        size, vocab_size = lm_head.in_features, lm_head.out_features
        if token_map is None:
            return self._take(name, (vocab_size, size))
        if name in self._left and len(self._left[name]) == vocab_size:  # not reduced yet
            return self._take(name, (vocab_size, size))[token_map]
        return self._take(name, (len(token_map), size))

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._left:
            raise CheckpointError(
                f"{self.file} lacks the tensor {name}, expected with shape {list(shape)}: it is incomplete."
            )
        tensor = self._left.pop(name)
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"The tensor {name} of {self.file} is {tensor.dtype}: expected floating-point weights."
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"The tensor {name} of {self.file} has the shape {list(tensor.shape)}, but this base model asks for "
                f"{list(shape)}: its hidden size or vocabulary is not that of the model the heads were trained for."
            )
        return tensor


def _build(tensors: _Tensors, lm_head: nn.Linear) -> MedusaHeads:
    """Heads over a base model whose output projection is ``lm_head``."""
    vocab_size, size = lm_head.out_features, lm_head.in_features
    token_map = tensors.token_map(vocab_size)
    blocks = [[tensors.block(k, j, size) for j in range(tensors.num_layers)] for k in range(tensors.num_heads)]
    projections = tensors.projections(token_map, lm_head)
    conditions = [tensors.condition(k, size) for k in range(tensors.num_heads) if tensors.conditioned]
    tensors.check_none_left()
    config = HeadsConfig(
        num_heads=tensors.num_heads,
        num_layers=tensors.num_layers,
        hidden_size=size,
        draft_vocab_size=vocab_size if token_map is None else len(token_map),
        shared_lm_head=projections is None,
        reduced_vocab=token_map is not None,
        one_projection=projections is not None and len(projections) < tensors.num_heads,
        conditioned=tensors.conditioned,
    )
    with torch.device("meta"):  # what it would fill with zeros and noise is here already
        heads = MedusaHeads(config, lm_head)
    for j, layer in enumerate(heads.residual_layers):
        weights = [block[j][0].T for block in blocks]
        if layer.conditioned:
            weights = [torch.cat([own, given.T]) for own, given in zip(weights, conditions, strict=True)]
        layer.weight = nn.Parameter(torch.stack(weights))
        layer.bias = nn.Parameter(torch.stack([block[j][1].unsqueeze(0) for block in blocks]))
    for projection, parameter in zip(heads.projections or (), projections or (), strict=True):
        projection.weight = parameter
    heads.token_map = token_map
    return heads

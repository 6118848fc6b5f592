"""Read a GGUF file's tensors with transformers' names and layout, without transformers' reader.

llama.cpp stores some weights in another layout than transformers. This module undoes each change:

* llama: the rows of q and k alternate between the two halves of each head;
* gemma: the weights of norms are larger by one;
* gpt2: matrices are transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from medusa_export.compat.gguf import release_pages
from medusa_export.models.blocks import BlockWeight
from medusa_export.models.gguf.blocks import BLOCK_KINDS, BlockKind
from medusa_export.models.gguf.metadata import ROPE_FACTORS
from medusa_export.models.gguf.settings import ARCHITECTURES, Architecture
from medusa_export.models.packed import StoredBlocks

# Kinds of numbers that are stored as they are, by gguf's names.
_NUMBERS = ("F16", "BF16", "F32", "F64")
# Rows that are dequantized at once.
_ROWS = 1024

# llama.cpp ignores the last too.
_NO_WEIGHTS = (*ROPE_FACTORS, ".attn_rot_embd")


def architecture_of(reader: Any) -> str:
    """The name of a file's architecture."""
    return str(reader.fields["general.architecture"].contents())


def tensor_names(architecture: str, model: PreTrainedModel) -> dict[str, str]:
    """The name of the model's weight that each tensor of a GGUF file is, by the tensor's name."""
    gguf: Any = import_module("gguf")
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    names = {}
    for name in model.state_dict():
        stem, dot, suffix = name.rpartition(".")
        found = known.get_name(stem)
        if found is not None:
            names[f"{found}{dot}{suffix}"] = name
    return names


def unread_tensors(reader: Any, model: PreTrainedModel) -> set[str]:
    """The names of a file's tensors that are no weight of the model."""
    names = tensor_names(architecture_of(reader), model)
    return {
        tensor.name
        for tensor in reader.tensors
        if tensor.name not in names and not any(part in tensor.name for part in _NO_WEIGHTS)
    }


class StoredTensor:
    """A tensor of a GGUF file. It is read, dequantized and laid out as the model has it when it is asked for.

    Args:
        reader: The ``gguf.GGUFReader`` of the file.
        tensor: The tensor, as ``gguf`` describes it.
        weight: The name of the model's weight that it is; None if there is none.
        architecture: The file's architecture.
        config: The model's configuration.

    Attributes:
        name: The tensor's name in the file.
        weight: As given.
        shape: Its shape in the layout of the model.
        kind: How it is stored, for messages; None if it is stored as numbers of 16 or 32 bits.
        blocks: Reads it in blocks of integers; None if no blocks hold it exactly.
    """

    def __init__(
        self, reader: Any, tensor: Any, weight: str | None, architecture: Architecture, config: PreTrainedConfig
    ) -> None:
        self._reader, self._tensor, self._architecture, self._config = reader, tensor, architecture, config
        self.name: str = tensor.name
        self.weight = weight
        turned = bool(architecture.transposed) and self.name.endswith(architecture.transposed)
        shape = [int(size) for size in tensor.shape]
        self.shape = tuple(shape if turned else reversed(shape))  # a file names the fastest dimension first
        kind = str(tensor.tensor_type.name)
        self.kind = None if kind in _NUMBERS else f"GGUF {kind}"
        held = None if turned or len(shape) != 2 else BLOCK_KINDS.get(kind)
        self.blocks: StoredBlocks | None = None
        if held is not None:
            self.blocks = StoredBlocks(
                held.bits,
                held.block_size,
                False,
                held.scale_dtype,
                partial(self._read_blocks, held),
                held.has_offsets,
            )

    def _read_blocks(self, kind: BlockKind) -> BlockWeight:
        parts: list[NDArray[Any]] = list(kind.unpack(self._tensor.data))
        laid_out = [_laid_out(part, self.name, self._architecture, self._config) for part in parts]
        values, scales, *offsets = (torch.from_numpy(np.ascontiguousarray(part)) for part in laid_out)
        release_pages(self._reader)
        return BlockWeight(kind.bits, kind.block_size, values, scales, offsets=offsets[0] if offsets else None)

    def __getitem__(self, index: Any) -> Tensor:
        """Reads some of the values, as one reads from an open safetensors file."""
        laid_out = _laid_out(_dequantized(self._tensor), self.name, self._architecture, self._config)
        # Numbers that the file holds as they are come as a view of the file, which can't be written to.
        values = torch.from_numpy(laid_out) if laid_out.flags.writeable else torch.tensor(laid_out)
        release_pages(self._reader)
        return values[index]


def stored_tensors(reader: Any, model: PreTrainedModel) -> Iterator[StoredTensor]:
    """Each tensor of a file that holds weights."""
    architecture = ARCHITECTURES[architecture_of(reader)]
    names = tensor_names(architecture_of(reader), model)
    for tensor in reader.tensors:
        if not any(part in tensor.name for part in _NO_WEIGHTS):
            yield StoredTensor(reader, tensor, names.get(tensor.name), architecture, model.config)


def _dequantized(tensor: Any) -> NDArray[np.float32]:
    """A tensor's values as the file lays them out, read in parts, since to dequantize takes four times their size."""
    gguf: Any = import_module("gguf")
    rows, kind = tensor.data, tensor.tensor_type
    if len(rows) <= _ROWS:
        whole: NDArray[np.float32] = gguf.quants.dequantize(rows, kind)
        return whole  # a view of the file, where the file holds such numbers
    values = np.empty([int(size) for size in reversed(tensor.shape)], np.float32)
    for start in range(0, len(rows), _ROWS):
        values[start : start + _ROWS] = gguf.quants.dequantize(rows[start : start + _ROWS], kind)
    return values


def _laid_out(values: NDArray[Any], name: str, architecture: Architecture, config: Any) -> NDArray[Any]:
    if architecture.interleaved and ".attn_q." in name:
        return _halves(values, config.num_attention_heads)
    if architecture.interleaved and ".attn_k." in name:
        return _halves(values, config.num_key_value_heads)
    if architecture.norm_offset and name.endswith("norm.weight"):
        return values - architecture.norm_offset
    if architecture.transposed and name.endswith(architecture.transposed):
        return values.T
    return values


def _halves(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Sorts rows that alternate between the two halves of a head: first half, then second half."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)

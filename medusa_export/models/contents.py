"""The tensors of files of weights, each read when it is asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from medusa_export.common.errors import CheckpointError


class Readable(Protocol):
    """A tensor that is read when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""

    def __getitem__(self, index: Any) -> Tensor:
        """Reads some of the values."""


@dataclass(frozen=True)
class Contents:
    """The tensors of a checkpoint's files, and the metadata in the files' headers.

    Attributes:
        tensors: The tensors, by name.
        metadata: The metadata of all files together.
    """

    tensors: Mapping[str, Readable]
    metadata: Mapping[str, str]

    def modules(self) -> Iterator[tuple[str, dict[str, Readable]]]:
        """Yields each module's name, and its tensors by the last part of their names."""
        grouped: defaultdict[str, dict[str, Readable]] = defaultdict(dict)
        for name, tensor in self.tensors.items():
            module, _, last = name.rpartition(".")
            grouped[module][last] = tensor
        yield from grouped.items()


def read(tensor: Readable) -> Tensor:
    """Reads all values of a tensor."""
    return tensor[...]


class _OpenTensor:
    """A tensor of an open safetensors file."""

    def __init__(self, opened: Any, name: str) -> None:
        self._opened, self._name = opened, name
        part = opened.get_slice(name)
        self.shape: tuple[int, ...] = tuple(part.get_shape())
        self._type: str = part.get_dtype()

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype.

        Raises:
            CheckpointError: PyTorch lacks the type of the stored values.
        """
        if self._type not in _DTYPES:
            raise CheckpointError(f"The tensor {self._name} is stored as {self._type}, which can't be read.")
        return _DTYPES[self._type]

    def __getitem__(self, index: Any) -> Tensor:
        values: Tensor = self._opened.get_tensor(self._name)
        return values[index]


class _PickledTensor:
    """A tensor of a file that PyTorch wrote.

    Each read maps the file again: the pages that are read through a mapping stay in memory until it ends.
    """

    def __init__(self, file: Path, name: str, mapped: Tensor) -> None:
        self._file, self._name = file, name
        self.shape: tuple[int, ...] = tuple(mapped.shape)
        self.dtype = mapped.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return _mapped(self._file)[self._name][index].clone()


_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def open_contents(files: list[Path]) -> Contents:
    """Opens files of weights. They stay open while the tensors live."""
    tensors: dict[str, Readable] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if file.suffix == ".safetensors":
            # Pages of a mapped file would stay in memory until all are read.
            opened: Any = safe_open(file, framework="pt", backend="pread")
            metadata |= opened.metadata() or {}
            tensors |= {name: _OpenTensor(opened, name) for name in opened.keys()}  # noqa: SIM118  # no dictionary
        else:
            tensors |= open_pickle(file)
    return Contents(tensors, metadata)


def open_pickle(file: Path) -> Mapping[str, Readable]:
    """Opens a file that PyTorch wrote. A file of before 2020 can't be mapped: its tensors are read at once.

    Raises:
        CheckpointError: The file holds something else than named tensors.
    """
    try:
        return {name: _PickledTensor(file, name, tensor) for name, tensor in _mapped(file).items()}
    except RuntimeError:
        return _named_tensors(file, torch.load(file, map_location="cpu", weights_only=True))


def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that PyTorch wrote, mapped into memory."""
    return _named_tensors(file, torch.load(file, map_location="cpu", weights_only=True, mmap=True))


def _named_tensors(file: Path, state: object) -> dict[str, Tensor]:
    """Refuses the content of a file that is no table of named tensors."""
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError(f"{file} is not a table of named tensors: save the state_dict of a module.")
    return state

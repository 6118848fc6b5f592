"""torchao: tensors of its own classes, described in the header of a safetensors file. The library dequantizes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medusa_export.models.contents import Contents, Readable
from medusa_export.models.packed import PackedTensor
from medusa_export.models.quantized.library import library

_MODULE = "torchao.prototype.safetensors.safetensors_support"


def torchao_weights(contents: Contents, settings: Mapping[str, Any]) -> Iterator[PackedTensor]:
    """The matrices that torchao packed.

    Raises:
        MissingExtraError: torchao is not installed.
    """
    unflatten = library("torchao", _MODULE).unflatten_tensor_state_dict
    for name, description in contents.metadata.items():
        kind = json.loads(description).get("_type") if description.startswith("{") else None
        if kind is None or kind == torch.Tensor.__name__:
            continue
        module, _, last = name.rpartition(".")
        prefix = f"{module}._{last}_"
        parts = {key: tensor for key, tensor in contents.tensors.items() if key.startswith(prefix)}
        made = partial(_made, unflatten, name, parts, description)
        yield PackedTensor(
            name, tuple(made().shape), f"torchao {kind}", frozenset(parts), partial(_dequantized, made)
        )  # only torchao knows the shape


def _made(unflatten: Any, name: str, parts: Mapping[str, Readable], description: str) -> Tensor:
    """Reads a tensor of one of torchao's classes."""
    metadata = {"tensor_names": json.dumps([name]), name: description}
    made, _ = unflatten({key: part[...] for key, part in parts.items()}, metadata)
    tensor: Tensor = made[name]
    return tensor


def _dequantized(made: Callable[[], Tensor]) -> Tensor:
    return made().dequantize()

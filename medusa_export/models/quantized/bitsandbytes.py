"""bitsandbytes: nf4, fp4 and int8. The library dequantizes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medusa_export.models.contents import Contents, Readable
from medusa_export.models.packed import PackedTensor
from medusa_export.models.quantized.library import library

# Of a 4-bit matrix, behind the name of its weight; of an 8-bit matrix, behind the name of its module.
_STATE = "quant_state.bitsandbytes__"
_STATE_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MEMBERS_8 = ("weight", "SCB", "weight_format")


def bitsandbytes_weights(contents: Contents, settings: Mapping[str, Any]) -> Iterator[PackedTensor]:
    """The matrices that bitsandbytes packed.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    functions = library("bitsandbytes").functional
    for name, state in contents.tensors.items():
        weight, dot, kind = name.partition(f".{_STATE}")
        if dot:
            parts = {part: contents.tensors.get(f"{weight}.{part}") for part in _STATE_TENSORS}
            found = {part: tensor for part, tensor in parts.items() if tensor is not None}
            shape = json.loads(bytes(state[...].tolist()))["shape"]
            yield PackedTensor(
                weight,
                tuple(shape),
                f"bitsandbytes {kind}",
                frozenset((weight, name, *(f"{weight}.{part}" for part in found))),
                partial(_dequantized_4, functions, contents.tensors[weight], {**found, f"{_STATE}{kind}": state}),
            )
    for module, members in contents.modules():
        if "SCB" in members:
            yield PackedTensor(
                f"{module}.weight",
                members["weight"].shape,
                "bitsandbytes int8",
                frozenset(f"{module}.{part}" for part in _MEMBERS_8 if part in members),
                partial(_dequantized_8, functions, members["weight"], members["SCB"]),
            )


def _dequantized_4(functions: Any, weight: Readable, parts: Mapping[str, Readable]) -> Tensor:
    state = functions.QuantState.from_dict({name: part[...] for name, part in parts.items()}, device="cpu")
    values: Tensor = functions.dequantize_4bit(weight[...], state)
    return values


def _dequantized_8(functions: Any, weight: Readable, scales: Readable) -> Tensor:
    values: Tensor = functions.int8_vectorwise_dequant(weight[...], scales[...].to(torch.float32))
    return values

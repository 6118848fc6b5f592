"""Methods of quantization whose files can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from medusa_export.models.contents import Contents, Readable
from medusa_export.models.packed import PackedTensor
from medusa_export.models.quantized.awq import awq_weights
from medusa_export.models.quantized.bitsandbytes import bitsandbytes_weights
from medusa_export.models.quantized.compressed import compressed_weights
from medusa_export.models.quantized.fp8 import fp8_weights
from medusa_export.models.quantized.gptq import gptq_weights
from medusa_export.models.quantized.torchao import torchao_weights

_Find = Callable[[Contents, Mapping[str, Any]], Iterator[PackedTensor]]

# By ``quant_method`` of ``quantization_config``.
METHODS: Mapping[str, _Find] = {
    "awq": awq_weights,
    "bitsandbytes": bitsandbytes_weights,
    "compressed-tensors": compressed_weights,
    "fp8": fp8_weights,
    "gptq": gptq_weights,
    "torchao": torchao_weights,
}


def unpacked(contents: Contents, settings: Mapping[str, Any]) -> dict[str, Readable | PackedTensor]:
    """The tensors of a quantized checkpoint under the names of an ordinary one. Packed weights are dequantized.

    Args:
        contents: The tensors of the files.
        settings: The ``quantization_config``. Its method must be one of ``METHODS``.

    Raises:
        CheckpointError: The weights are packed in a way that can't be read.
        MissingExtraError: A library that dequantizes them is not installed.
    """
    packed = list(METHODS[settings["quant_method"]](contents, settings))
    members = frozenset().union(*(weight.members for weight in packed))
    plain = {name: tensor for name, tensor in contents.tensors.items() if name not in members}
    return {**plain, **{weight.name: weight for weight in packed}}

"""Names of types, as options take them."""

from __future__ import annotations

from typing import Literal, get_args

from medusa_export.common.errors import OptionError

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
IntegerType = Literal["int8", "int4"]
INTEGER_TYPES: tuple[IntegerType, ...] = get_args(IntegerType)
WeightType = Literal["int8", "int4", "fp8", "fp32", "fp16", "bf16"]
WEIGHT_TYPES: tuple[WeightType, ...] = get_args(WeightType)
KvCacheType = Literal["int8"]
KV_CACHE_TYPES: tuple[KvCacheType, ...] = get_args(KvCacheType)
_TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def torch_name(dtype: str) -> str:
    """PyTorch's name of a type, such as ``float16`` for ``fp16``.

    Raises:
        OptionError: The type is unknown.
    """
    if dtype not in _TORCH_NAMES:
        raise OptionError(f"There is no type {dtype!r}: give one of {', '.join(DTYPES)}.")
    return _TORCH_NAMES[dtype]


def short_name(dtype: object) -> str:
    """The name of a type as options take it, such as ``fp16`` for ``torch.float16``."""
    name = str(dtype).removeprefix("torch.")
    return next((short for short, full in _TORCH_NAMES.items() if full == name), name)

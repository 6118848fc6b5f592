"""Fine-grained fp8: matrices in fp8 with a scale per tile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from medusa_export.models.contents import Contents
from medusa_export.models.packed import PackedTensor
from medusa_export.models.quantized.scaled import scaled_reader

# Scales of activations play no part in the weights.
_MEMBERS = ("weight", "weight_scale_inv", "activation_scale")


def fp8_weights(contents: Contents, settings: Mapping[str, Any]) -> Iterator[PackedTensor]:
    """The matrices in fp8."""
    for module, parts in contents.modules():
        if "weight_scale_inv" in parts:
            yield PackedTensor(
                f"{module}.weight",
                parts["weight"].shape,
                "fp8",
                frozenset(f"{module}.{part}" for part in _MEMBERS if part in parts),
                scaled_reader(parts["weight"], parts["weight_scale_inv"]),
            )

"""The network that TensorRT parses from a graph, and its comparison with the contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medusa_export.common.errors import EngineBuildError
from medusa_runtime.bundles.bundle import DESCRIPTION, Bundle
from medusa_runtime.bundles.contract import TensorSpec


def layers_of(network: Any) -> Iterator[Any]:
    """Yields the layers of a network."""
    return (network.get_layer(index) for index in range(network.num_layers))


def check_network(trt: Any, network: Any, bundle: Bundle, capacity: int) -> None:
    """Checks a parsed network against the contract: names, types and shapes, and which outputs are updated inputs.

    Args:
        trt: TensorRT's Python module.
        network: The parsed network.
        bundle: The bundle that the graph is from.
        capacity: C, slots per row.

    Raises:
        EngineBuildError: The network differs.
    """
    ours = [*bundle.inputs, *bundle.outputs]
    theirs = [network.get_input(i) for i in range(network.num_inputs)]
    theirs += [network.get_output(i) for i in range(network.num_outputs)]
    expected = [_as_network_tensor(trt, spec, capacity) for spec in ours]
    found = [(value.name, value.dtype, tuple(value.shape)) for value in theirs]
    if sorted(map(str, expected)) != sorted(map(str, found)):
        wrong = sorted(set(map(str, found)) ^ set(map(str, expected)))
        raise EngineBuildError(
            f"The network that TensorRT parsed differs from {DESCRIPTION}: {wrong[0]}.",
            remedy="Export the bundle again.",
        )
    pairs = {state.present: state.past for state in bundle.states}
    if updated_in_place(trt, network) != pairs:
        raise EngineBuildError(
            "TensorRT doesn't update every cache in place.", remedy="Export the bundle again, or update TensorRT."
        )


def _as_network_tensor(trt: Any, spec: TensorSpec, capacity: int) -> tuple[str, Any, tuple[int, ...]]:
    kinds = {
        "int64": trt.int64, "bool": trt.bool, "float32": trt.float32, "float16": trt.float16,
        "bfloat16": trt.bfloat16, "uint8": trt.uint8,
    }  # fmt: skip
    shape = tuple(size if isinstance(size, int) else capacity if size == "capacity" else -1 for size in spec.shape)
    return spec.name, kinds[spec.dtype], shape


def updated_in_place(trt: Any, network: Any) -> dict[str, str]:
    """Returns the outputs that share memory with an input, those of cache updates, as {output: input}."""
    return {
        layer.get_output(0).name: layer.get_input(0).name
        for layer in layers_of(network)
        if layer.type == trt.LayerType.KV_CACHE_UPDATE
    }

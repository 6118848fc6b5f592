"""The graph for TensorRT, and its rewrites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.pipeline import Pipeline
from medusa_export.graph.rewrites.rewrite import StepFacts
from medusa_export.targets.tensorrt.rewrites.block_weights import SignBlockWeights
from medusa_export.targets.tensorrt.rewrites.capacity import FreezeCapacity
from medusa_export.targets.tensorrt.rewrites.clips import SpellOutClips
from medusa_export.targets.tensorrt.rewrites.heads import SplitHeadsLast
from medusa_export.targets.tensorrt.rewrites.indices import NarrowIndices
from medusa_export.targets.tensorrt.rewrites.parts import PickParts
from medusa_export.targets.tensorrt.rewrites.prefixes import LookUpPrefixes
from medusa_export.targets.tensorrt.rewrites.query_groups import FoldQueryGroups
from medusa_export.targets.tensorrt.rewrites.ranks import BroadcastConstants, RaiseRanks
from medusa_export.targets.tensorrt.rewrites.rms_norms import SpellOutRmsNorms
from medusa_export.targets.tensorrt.rewrites.soft_caps import SpellOutSoftCaps
from medusa_runtime.bundles.bundle import WEIGHTS, Bundle

TENSORRT = Pipeline(
    "for TensorRT",
    SignBlockWeights,
    FreezeCapacity,
    SplitHeadsLast,
    FoldQueryGroups,
    SpellOutSoftCaps,
    SpellOutRmsNorms,
    SpellOutClips,
    PickParts,
    LookUpPrefixes,
    BroadcastConstants,
    RaiseRanks,
    NarrowIndices,
)


# Larger constants that rewrites made are apart from the graph, which a file of 2 GB must hold.
_LARGEST_INSIDE = 1 << 20


@dataclass(frozen=True)
class TensorrtGraph:
    """A graph for TensorRT.

    Attributes:
        data: The graph as a serialized ``ModelProto``. Weights are references to the bundle's file.
        rewrites: Number of places that each rewrite changed, by its name.
        made: The bytes of large constants that rewrites made, by name. Their references in ``data`` mean nothing.
    """

    data: bytes
    rewrites: Mapping[str, int]
    made: Mapping[str, np.ndarray] = field(default_factory=dict)


def graph_for_tensorrt(bundle: Bundle, capacity: int) -> TensorrtGraph:
    """Rewrites a bundle's standard graph for TensorRT: caches of a fixed capacity, few layers, signed integers.

    Args:
        bundle: The bundle.
        capacity: C, slots per row.

    Raises:
        RewriteError: A rewrite failed. It names the rewrite.
    """
    model = ir.load(bundle.graph)
    step = StepFacts(margin=bundle.slots.margin, max_positions=bundle.model.max_positions, capacity=capacity)
    counts = TENSORRT.run(model, step)
    made = _set_apart(model)
    return TensorrtGraph(ir.to_proto(model).SerializeToString(), counts, made)


def _set_apart(model: ir.Model) -> dict[str, np.ndarray]:
    """Takes large constants out of a graph; returns their bytes by name."""
    made = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < _LARGEST_INSIDE:
            continue
        made[name] = np.frombuffer(tensor.tobytes(), np.uint8)
        value.const_value = ir.ExternalTensor(
            WEIGHTS, offset=0, length=tensor.nbytes, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return made

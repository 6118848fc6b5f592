"""The graph for TensorRT, and its rewrites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from medusa_export.graph.rewrites.pipeline import Pipeline
from medusa_export.graph.rewrites.rewrite import StepFacts
from medusa_export.targets.tensorrt.rewrites.capacity import FreezeCapacity
from medusa_export.targets.tensorrt.rewrites.heads import SplitHeadsLast
from medusa_export.targets.tensorrt.rewrites.parts import PickParts
from medusa_export.targets.tensorrt.rewrites.prefixes import LookUpPrefixes
from medusa_export.targets.tensorrt.rewrites.query_groups import FoldQueryGroups
from medusa_export.targets.tensorrt.rewrites.ranks import BroadcastConstants
from medusa_export.targets.tensorrt.rewrites.rms_norms import SpellOutRmsNorms
from medusa_export.targets.tensorrt.rewrites.soft_caps import SpellOutSoftCaps
from medusa_runtime.bundles.bundle import Bundle

TENSORRT = Pipeline(
    "for TensorRT",
    FreezeCapacity,
    SplitHeadsLast,
    FoldQueryGroups,
    SpellOutSoftCaps,
    SpellOutRmsNorms,
    PickParts,
    BroadcastConstants,
    LookUpPrefixes,
)


@dataclass(frozen=True)
class TensorrtGraph:
    """A graph for TensorRT.

    Attributes:
        data: The graph as a serialized ``ModelProto``. Weights are references to the bundle's file.
        rewrites: Number of places that each rewrite changed, by its name.
    """

    data: bytes
    rewrites: Mapping[str, int]


def graph_for_tensorrt(bundle: Bundle, capacity: int) -> TensorrtGraph:
    """Rewrites a bundle's standard graph for TensorRT: caches of a fixed capacity, few layers.

    Args:
        bundle: The bundle.
        capacity: C, slots per row.

    Raises:
        RewriteError: A rewrite failed. It names the rewrite.
    """
    model = ir.load(bundle.graph)
    step = StepFacts(margin=bundle.slots.margin, max_positions=bundle.model.max_positions, capacity=capacity)
    counts = TENSORRT.run(model, step)
    return TensorrtGraph(ir.to_proto(model).SerializeToString(), counts)

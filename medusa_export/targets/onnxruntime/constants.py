"""Names and versions in the graphs for ONNX Runtime, and their constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites import building

IR_VERSION = 11
# ONNX Runtime's own operators.
CONTRIB = "com.microsoft"
# Output in place of pending entries: nodes of the accepted path.
PATH = "accepted_path"


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant of a graph by its name, which no constant of the standard graph has."""
    return building.initializer(graph, f"onnxruntime/{name}", array)


def integers(graph: ir.Graph, name: str, values: int | list[int]) -> ir.Value:
    """Integers as a constant of a graph, by its name."""
    return initializer(graph, name, np.array(values, dtype=np.int64))


def target_shape(graph: ir.Graph, *axes: int) -> ir.Value:
    """The shape that a ``Reshape`` makes, as a constant of a graph. 0 keeps an axis, -1 is what the others leave."""
    return integers(graph, f"shape_{'_'.join(map(str, axes))}", list(axes))

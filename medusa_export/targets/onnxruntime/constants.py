"""Names, versions and tuning constants of the graphs for ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites import building

IR_VERSION = 11
# ONNX Runtime's own operators.
CONTRIB = "com.microsoft"
# Output in place of ``next_pending_kv``: nodes of the accepted path.
PATH = "accepted_path"

# Rows of rotary tables beyond the longest sequence. Padding has such positions, and drafts at the end of a sequence.
SLACK = 1024
# Bytes of the largest rotary table that a graph keeps. Longer ones are computed in each step.
LARGEST_TABLE = 2**28
# Logits are searched by blocks only if there are this many blocks at least.
SMALLEST_BLOCK = 8


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A constant of a graph by its name, which no constant of the standard graph has."""
    return building.initializer(graph, f"onnxruntime/{name}", array)


def integers(graph: ir.Graph, name: str, values: int | list[int]) -> ir.Value:
    """Integers as a constant of a graph, by its name."""
    return initializer(graph, name, np.array(values, dtype=np.int64))

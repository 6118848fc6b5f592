"""Give out the accepted path in place of pending entries."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes

from medusa_export.graph.rewrites.matching import value_named
from medusa_export.graph.rewrites.rewrite import NotApplicableError, Rewrite
from medusa_export.targets.onnxruntime.constants import PATH


class ReplacePendingEntries(Rewrite):
    """Replaces pending entries by the output ``accepted_path`` [B, M + 1].

    1. The inputs ``pending_*`` and the outputs ``next_pending_*`` go. The backend moves the entries of accepted nodes
       to their slots by ``accepted_path`` (see ``medusa_runtime.backends.onnxruntime``).

    A graph without a tree (M = 0) has no pending entries, and stays as it is.

    Precondition: Attention reads and writes new entries only.
    """

    name = "replace_pending_entries"

    def apply(self, model: ir.Model) -> int:
        if not self.step.margin:
            return 0
        graph = model.graph
        for value in [value for value in graph.outputs if (value.name or "").startswith("next_pending_")]:
            graph.outputs.remove(value)
        passes.RemoveUnusedNodesPass()(model)
        for value in [value for value in graph.inputs if (value.name or "").startswith("pending_")]:
            if value.uses():
                raise NotApplicableError("an attention is of plain operators, as with sinks, and reads pending entries")
            graph.inputs.remove(value)
        graph.outputs.append(value_named(graph, PATH))
        return 1

"""Skip acceptance and drafting in plain steps."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import graph_input, shape_of, value_named
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.branches import branch, is_plain_step
from medusa_export.targets.onnxruntime.constants import PATH, integers


class SkipTreesInPlainSteps(Rewrite):
    """Skips acceptance and drafting in plain steps.

    1. A plain step emits the chosen token, or nothing if its logits are not finite. It accepts the root and drafts
       nothing. The ``If`` accepts and drafts in all other steps.

    A graph without a tree (M = 0) stays as it is.

    Precondition: ``ReplacePendingEntries`` has run.
    """

    name = "skip_trees_in_plain_steps"

    def apply(self, model: ir.Model) -> int:
        if not self.step.margin:
            return 0
        graph = model.graph
        results = {name: value_named(graph, name) for name in ("tokens", "count", "next_input_ids", PATH)}
        chosen = value_named(graph, "chosen")
        depth, size = shape_of(results["tokens"])[1], shape_of(results["next_input_ids"])[1]
        assert isinstance(depth, int)
        assert isinstance(size, int)
        plain = is_plain_step(graph)
        make = Builder(graph)
        made = _plain_results(make, chosen, depth, size)
        if any(value.name == "logprobs" for value in graph.outputs):
            results["logprobs"] = value_named(graph, "logprobs")
            made["logprobs"] = _plain_logprobs(make, chosen, depth)
        branch(graph, "tree", plain, results, made, make.nodes, outside=chosen)
        return 1


def _plain_results(make: Builder, chosen: ir.Value, depth: int, size: int) -> dict[str, ir.Value]:
    """Results of a plain step that emits ``chosen`` [B, 1], by name.

    Args:
        make: Makes the nodes.
        chosen: The chosen token of each row.
        depth: M + 1, the number of tokens that a step can emit.
        size: T, the number of nodes of the tree.
    """
    graph = make.graph
    finite, root = value_named(graph, "finite"), graph_input(graph, "input_ids")
    tokens = make("Expand", [chosen, integers(graph, "emitted", [1, depth])])
    count = make("Cast", [make("Squeeze", [finite, integers(graph, "axis_one", [1])])], to=ir.DataType.INT64)
    padding = integers(graph, "undrafted", [0, 0, 0, size - 1])
    following = make("Pad", [make("Where", [finite, chosen, root]), padding])
    path = make("Mul", [tokens, integers(graph, "scalar_zero", 0)])
    return {"tokens": tokens, "count": count, "next_input_ids": following, PATH: path}


def _plain_logprobs(make: Builder, chosen: ir.Value, depth: int) -> ir.Value:
    """Log probabilities [B, M + 1] of ``chosen`` [B, 1]."""
    graph = make.graph
    last = integers(graph, "last_of_three", [2])
    logit = make("GatherElements", [value_named(graph, "logits"), make("Unsqueeze", [chosen, last])], axis=2)
    logit = make("Cast", [make("Squeeze", [logit, last])], to=ir.DataType.FLOAT)
    logprob = make("Sub", [logit, value_named(graph, "sampled/log_total")])
    return make("Expand", [logprob, integers(graph, "emitted", [1, depth])])

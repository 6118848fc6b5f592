"""Skip sampling in steps in which no row samples."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import given, graph_input, has_input, value_named
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.branches import branch
from medusa_export.targets.onnxruntime.constants import initializer, integers

_RANDOM_NUMBERS = "exponentials"
_EDITED_TOKENS = "edit_tokens"  # a step with any constraint has some


class SkipSamplingInGreedySteps(Rewrite):
    """Skips sampling, or parts of it, where a step does not need them.

    1. A step without random numbers takes the best tokens. The ``If`` samples in all other steps.
    2. Within that branch, a second ``If`` skips biases, penalties and masks if there are none.
    3. A third one skips the search for the end of the nucleus if no nucleus goes beyond the best tokens.

    A graph that can't sample stays as it is.
    """

    name = "skip_sampling_in_greedy_steps"

    def apply(self, model: ir.Model) -> int:
        if not has_input(model.graph, _RANDOM_NUMBERS):
            return 0
        sampling = _skip_sampling(model.graph)
        _skip_constraints(model.graph, sampling)
        _skip_search(model.graph, sampling)
        return 1


def _skip_sampling(graph: ir.Graph) -> ir.Graph:
    """Puts sampling into a branch, and returns that branch."""
    best = next(
        node.outputs[0] for node in graph if node.op_type == "ArgMax" and given(node.inputs[0]).name == "logits"
    )
    head = Builder(graph)
    draws = head("Squeeze", [head("Shape", [graph_input(graph, _RANDOM_NUMBERS)], start=1, end=2)])
    none_draws = head("Equal", [draws, integers(graph, "scalar_zero", 0)])
    graph.insert_before(graph[0], head.nodes)

    names = ("chosen", "sampled/typical", "sampled/typical_logprobs", "sampled/log_total")
    results = {name: value_named(graph, name) for name in names}
    make = Builder(graph)
    like = make("Shape", [best])
    filled = [
        make("Expand", [initializer(graph, name, np.array(value)), like])
        for name, value in (("not_typical", False), ("no_logprob", np.float32(0)), ("no_total", np.float32(0)))
    ]
    short = dict(zip(names, [make("Identity", [best]), *filled], strict=True))
    return branch(graph, "sampling", none_draws, results, short, make.nodes, outside=best)


def _skip_constraints(graph: ir.Graph, sampling: ir.Graph) -> None:
    """Puts biases, penalties and masks into a branch of the branch that samples.

    Args:
        graph: The graph, which holds the constants.
        sampling: The branch that samples.
    """
    logits = next(given(node.inputs[0]) for node in sampling if node.op_type == "ScatterElements")
    head, make = Builder(graph), Builder(graph)
    edits = head("Squeeze", [head("Shape", [graph_input(graph, _EDITED_TOKENS)], start=2, end=3)])
    none = head("Equal", [edits, integers(graph, "scalar_zero", 0)])
    sampling.insert_before(sampling[0], head.nodes)
    same = {"constrained": make("Identity", [logits])}
    results = {"constrained": value_named(sampling, "sampled/constrained")}
    branch(sampling, "constraints", none, results, same, make.nodes, outside=logits)


def _skip_search(graph: ir.Graph, sampling: ir.Graph) -> None:
    """Puts the search for the end of the nucleus into a branch of the branch that samples.

    Args:
        graph: The graph, which holds the constants.
        sampling: The branch that samples.
    """
    beyond, nucleus_end = (value_named(sampling, f"sampled/{name}") for name in ("beyond", "nucleus_end"))
    head, make = Builder(graph), Builder(graph)
    any_beyond = head("ReduceMax", [head("Cast", [beyond], to=ir.DataType.INT32)], keepdims=0)
    small = head("Equal", [any_beyond, initializer(graph, "none_beyond", np.array(0, np.int32))])
    maker = beyond.producer()
    assert maker is not None
    sampling.insert_after(maker, head.nodes)
    end = make("Cast", [beyond], to=ir.DataType.FLOAT)
    branch(sampling, "nucleus", small, {"nucleus_end": nucleus_end}, {"nucleus_end": end}, make.nodes)

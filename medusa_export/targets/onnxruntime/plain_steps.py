"""What a plain step, of one token, passes by in a graph derived for ONNX Runtime: branches of an ``If``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from medusa_export.targets.onnxruntime.nodes import (
    IR_VERSION,
    PATH,
    Builder,
    given,
    initializer,
    integers,
    shape_of,
    value_named,
)


def is_plain_step(graph: ir.Graph) -> ir.Value:
    """Whether a step is of one token, computed at the head of the graph."""
    tokens = next(value for value in graph.inputs if value.name == "input_ids")
    head = Builder(graph)
    one = head("Equal", [head("Squeeze", [head("Shape", [tokens], start=1, end=2)]), integers(graph, "scalar_one", 1)])
    graph.insert_before(graph[0], head.nodes)
    return one


def is_plain_mask(graph: ir.Graph, mask: ir.Value, margin: int, max_positions: int) -> bool:
    """Whether the one token of a plain step looks at everything behind the margin, at whatever length.

    A sliding window would show: it is no longer than the longest sequence, or else of no effect.
    """
    names = ("input_ids", "num_tokens", "is_prefill", "cache_lengths")
    part = ir.convenience.extract(graph, inputs=[v for v in graph.inputs if v.name in names], outputs=[mask])
    model = ir.external_data.load_to_model(ir.Model(part, ir_version=IR_VERSION))
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    for length in (0, 1, max_positions - 1):
        given = {"input_ids": [[0]], "num_tokens": [1], "is_prefill": [False], "cache_lengths": [length]}
        (seen,) = evaluator.run(None, {name: np.array(given[name]) for name in names})
        if not np.array_equal(seen.squeeze(), np.arange(margin + length + 1) >= margin):
            return False
    return True


def skip_mask_in_plain_steps(graph: ir.Graph, is_plain: ir.Value, bias: ir.Value, margin: int, slots: int) -> None:
    """In a plain step a bias [1, 1, 1, filled slots] is cut from a table."""
    assert bias.dtype is not None
    table = np.zeros((1, 1, 1, slots), bias.dtype.numpy())
    table[..., :margin] = -np.inf
    make = Builder(graph)
    axis, start = integers(graph, "last_axis", [3]), integers(graph, "from_zero", [0])
    width = next(node.outputs[0] for node in graph if node.op_type == "ReduceMax")  # see _CacheState
    make("Slice", [initializer(graph, "plain_bias", table), start, width, axis])
    _branch(graph, "mask", is_plain, {"bias": bias}, {"bias": make.nodes[-1].outputs[0]}, make.nodes)


def skip_tree_in_plain_steps(graph: ir.Graph, is_plain: ir.Value) -> None:
    """A plain step emits the base model's choice if its logits are numbers, accepts the root, and drafts nothing."""
    results = {name: value_named(graph, name) for name in ("tokens", "count", "next_input_ids", PATH)}
    chosen = value_named(graph, "chosen")
    finite = value_named(graph, "finite")
    root = next(value for value in graph.inputs if value.name == "input_ids")
    _, depth = shape_of(results["tokens"])
    _, size = shape_of(results["next_input_ids"])
    assert isinstance(depth, int)
    assert isinstance(size, int)
    zero = integers(graph, "scalar_zero", 0)
    make = Builder(graph)
    tokens = make("Expand", [chosen, integers(graph, "emitted", [1, depth])])
    made = {
        "tokens": tokens,
        "count": make("Cast", [make("Squeeze", [finite, integers(graph, "axis_one", [1])])], to=ir.DataType.INT64),
        "next_input_ids": make(
            "Pad", [make("Where", [finite, chosen, root]), integers(graph, "undrafted", [0, 0, 0, size - 1])]
        ),
        PATH: make("Mul", [tokens, zero]),
    }
    if any(value.name == "logprobs" for value in graph.outputs):
        results["logprobs"] = value_named(graph, "logprobs")
        last = integers(graph, "last_of_three", [2])
        logit = make("GatherElements", [value_named(graph, "logits"), make("Unsqueeze", [chosen, last])], axis=2)
        logit = make("Cast", [make("Squeeze", [logit, last])], to=ir.DataType.FLOAT)
        logprob = make("Sub", [logit, value_named(graph, "sampled/log_total")])
        made["logprobs"] = make("Expand", [logprob, integers(graph, "emitted", [1, depth])])
    _branch(graph, "tree", is_plain, results, made, make.nodes, outside=chosen)


def skip_sampling_where_none_draws(graph: ir.Graph) -> None:
    """A step without numbers to draw with takes the best tokens; one whose nuclei are small does without a search."""
    best = next(
        node.outputs[0] for node in graph if node.op_type == "ArgMax" and given(node.inputs[0]).name == "logits"
    )
    numbers = next(value for value in graph.inputs if value.name == "exponentials")
    head = Builder(graph)
    draws = head("Squeeze", [head("Shape", [numbers], start=1, end=2)])
    none_draws = head("Equal", [draws, integers(graph, "scalar_zero", 0)])
    graph.insert_before(graph[0], head.nodes)

    names = ("chosen", "sampled/typical", "sampled/typical_logprobs", "sampled/log_total")
    results = {name: value_named(graph, name) for name in names}
    inner = {name: value_named(graph, f"sampled/{name}") for name in ("beyond", "nucleus_end")}
    make = Builder(graph)
    like = make("Shape", [best])
    filled = [
        make("Expand", [initializer(graph, name, np.array(value)), like])
        for name, value in (("not_typical", False), ("no_logprob", np.float32(0)), ("no_total", np.float32(0)))
    ]
    made = dict(zip(names, [make("Identity", [best]), *filled], strict=True))
    sampling = _branch(graph, "sampling", none_draws, results, made, make.nodes, outside=best)

    head, make = Builder(graph), Builder(graph)
    any_beyond = head("ReduceMax", [head("Cast", [inner["beyond"]], to=ir.DataType.INT32)], keepdims=0)
    small = head("Equal", [any_beyond, initializer(graph, "none_beyond", np.array(0, np.int32))])
    maker = inner["beyond"].producer()
    assert maker is not None
    sampling.insert_after(maker, head.nodes)
    end = make("Cast", [inner["beyond"]], to=ir.DataType.FLOAT)
    _branch(sampling, "nucleus", small, {"nucleus_end": inner["nucleus_end"]}, {"nucleus_end": end}, make.nodes)


def _branch(
    graph: ir.Graph,
    name: str,
    is_plain: ir.Value,
    results: Mapping[str, ir.Value],
    plain: Mapping[str, ir.Value],
    plain_nodes: Sequence[ir.Node],
    *,
    outside: ir.Value | None = None,
) -> ir.Graph:
    """Puts what only ``results`` need into a branch of an ``If``, beside a shorter one for steps that allow it.

    Args:
        graph: The graph.
        name: What to call the branch.
        is_plain: Whether to take the shorter one.
        results: Values of the graph.
        plain: What they are then, by the same names.
        plain_nodes: The nodes that compute that.
        outside: A value that stays outside, and what it is computed from too.

    Returns:
        The branch that has what was there before.
    """
    tail = _tail(graph, set(results.values()), outside)
    step = ir.node("If", [is_plain], num_outputs=len(results), name=name)
    graph.insert_after(tail[-1], step)
    for (key, old), new in zip(results.items(), step.outputs, strict=True):
        readers = [(use.node, use.idx) for use in old.uses() if use.node not in tail]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{name}/{key}"
        simple = plain[key]
        simple.name, simple.type, simple.shape = f"plain/{key}", old.type, old.shape
        for reader, index in readers:
            reader.replace_input_with(index, new)
        if old.is_graph_output():
            graph.outputs[graph.outputs.index(old)] = new
    graph.remove(tail)
    branches = {
        "then_branch": ir.Graph([], [plain[key] for key in results], nodes=plain_nodes, name="plain"),
        "else_branch": ir.Graph([], list(results.values()), nodes=tail, name=name),
    }
    for attribute, branch in branches.items():
        step.attributes[attribute] = ir.AttrGraph(attribute, branch)
    return branches["else_branch"]


def _tail(graph: ir.Graph, results: set[ir.Value], outside: ir.Value | None) -> list[ir.Node]:
    """The nodes that nothing but ``results`` needs, in order; ``outside`` and what it is computed from stay out."""
    tail: list[ir.Node] = []
    inside: set[ir.Node] = set()
    for node in reversed(list(graph)):
        values = [value for value in node.outputs if value not in results]
        if outside in values or any(value.is_graph_output() for value in values):
            continue
        readers = [use.node for value in values for use in value.uses()]
        if (readers or len(values) < len(node.outputs)) and all(reader in inside for reader in readers):
            inside.add(node)
            tail.append(node)
    return tail[::-1]

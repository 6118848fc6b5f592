"""Compile a ``MedusaStep`` to one standard ONNX graph."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import optimizer

from medusa_export.errors import ExportError
from medusa_export.layer_reuse import decoder_layers
from medusa_export.onnx_layers import expand_layers
from medusa_export.onnx_rewrites import fuse_rms_norm, fuse_rotary_embedding, index_rows, lay_out_linears
from medusa_export.onnx_trace import MARK_DOMAIN, quiet, trace
from medusa_export.step import MedusaStep
from medusa_runtime import contract

Progress = Callable[[str], None]
# Named values of the graph that are no outputs, for those who build other graphs from it.
INTERNAL = ("logits", "head_logits", "accepted_path")
REWRITES = (fuse_rms_norm, fuse_rotary_embedding, index_rows, lay_out_linears)


def _rename(value: ir.Value, name: str, shape: list[int | str] | None = None) -> ir.Value:
    value.name = name
    if shape is not None:
        value.shape = ir.Shape(shape)
    return value


def _layer_prefix(step: MedusaStep) -> str:
    """What the traced names of the decoder layers' weights begin with."""
    layers = decoder_layers(step.model)
    return next(f"step.model.{name}." for name, module in step.model.named_modules() if module is layers)


def _simplify(model: ir.Model) -> None:
    """Folds constants, but none that comes from a weight: copies of a layer must find their own weights."""
    weights = {name: value for name, value in model.graph.initializers.items() if name.startswith("step.model.")}
    tensors = {name: value.const_value for name, value in weights.items()}
    for value in weights.values():
        value.const_value = None
    try:
        with quiet():  # it remarks on each weight that it can't see
            optimizer.optimize_ir(model, input_size_limit=4096, output_size_limit=4096)
    finally:
        for name, value in weights.items():
            value.const_value = tensors[name]


def build_graph(step: MedusaStep, progress: Progress = lambda _: None) -> ir.Model:
    """Traces a step and brings the graph into the form of the contract.

    Weights stay where they are until the model is written. ``logits``, ``accepted_path`` and, with heads,
    ``head_logits`` are named values of the graph, not outputs.

    Raises:
        ModelNotSupportedError: The model does something that a step can't honour.
        ExportError: Tracing or assembling failed.
    """
    progress("tracing")
    model = trace(step)
    progress("assembling")
    graph = model.graph
    shape = step.cache_shape
    heads, head_dim, num_caches = shape.num_key_value_heads, shape.head_dim, shape.num_caches
    margin = step.tree.max_depth

    for node in graph:
        if node.op_type == "Attention":
            node.resize_outputs(1)
    _simplify(model)

    names = ["tokens", "count", "next_input_ids", "next_cache_lengths", "logits", "accepted_path"]
    names += ["head_logits", "next_pending_kv"] if margin else []
    outputs = dict(zip(names, graph.outputs, strict=False))

    cache_type = graph.inputs[4].type
    cache_shape: list[int | str] = ["batch", heads, "capacity", head_dim]
    caches = [
        ir.Value(name=contract.cache_name("past", i), type=cache_type, shape=ir.Shape(cache_shape))
        for i in range(num_caches)
    ]
    pending: list[ir.Value] = []
    inputs = [
        _rename(graph.inputs[0], "input_ids", ["batch", "sequence"]),
        *(_rename(value, value.name or "", ["batch"]) for value in graph.inputs[1:4]),
    ]
    if margin:
        pending_kv = ir.Value(
            name="pending_kv", type=cache_type, shape=ir.Shape(["batch", num_caches * heads, margin, head_dim])
        )
        inputs.append(pending_kv)
        split = ir.node("Split", [pending_kv], {"axis": 1, "num_outputs": num_caches}, num_outputs=num_caches)
        graph.insert_before(graph[0], split)
        pending = list(split.outputs)

    state = step.state_dict()
    present = expand_layers(
        model,
        layer_prefix=_layer_prefix(step),
        caches=caches,
        pending=pending,
        weight=lambda name: TorchTensor(state[name.removeprefix("step.")], name),
    )

    # What reads a stand-in reads its shape only, and all caches have the same.
    for stand_in, value in zip(graph.inputs[4:], [caches[0], *pending[:1]], strict=True):
        ir.convenience.replace_all_uses_with(stand_in, value)

    graph.inputs.clear()
    graph.inputs.extend([*inputs, *caches])
    shapes: dict[str, list[int | str]] = {
        "tokens": ["batch", margin + 1],
        "count": ["batch"],
        "next_input_ids": ["batch", step.tree.size],
        "next_cache_lengths": ["batch"],
        "next_pending_kv": ["batch", num_caches * heads, margin, head_dim],
    }
    for value in outputs.values():
        if value.is_graph_input() or value.is_initializer():
            raise ExportError("An output of the step is one of its inputs unchanged.")
    graph.outputs.clear()
    graph.outputs.extend(
        [
            *(_rename(outputs[name], name, shape) for name, shape in shapes.items() if name in outputs),
            *(_rename(value, contract.cache_name("present", i), cache_shape) for i, value in enumerate(present)),
        ]
    )
    for name in INTERNAL:
        if name in outputs:
            _rename(outputs[name], name)
    graph.name = "medusa_step"
    model.opset_imports.pop(MARK_DOMAIN, None)
    passes.CommonSubexpressionEliminationPass()(model)
    for rewrite in REWRITES:
        rewrite(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    return model

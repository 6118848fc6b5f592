"""Compile a ``MedusaStep`` to one standard ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnx_ir.tensor_adapters import TorchTensor

from medusa_export.common.errors import ExportError
from medusa_export.graph.layer_reuse import decoder_layers
from medusa_export.graph.layers import expand_layers
from medusa_export.graph.rewrites import fuse_rms_norm, fuse_rotary_embedding, index_rows, lay_out_linears
from medusa_export.graph.sampling import expand_sampling
from medusa_export.graph.trace import MARK_DOMAIN, simplify, trace
from medusa_export.step.step import MedusaStep
from medusa_runtime.bundles import contract
from medusa_runtime.bundles.contract import TensorSpec

Progress = Callable[[str], None]
REWRITES = (fuse_rms_norm, fuse_rotary_embedding, index_rows, lay_out_linears)


def _rename(value: ir.Value, name: str, shape: Sequence[int | str]) -> ir.Value:
    value.name = name
    value.shape = ir.Shape(shape)
    return value


def _contract_inputs(step: MedusaStep) -> tuple[TensorSpec, ...]:
    return contract.step_inputs(**_facts(step), vocab_size=step.vocab_size)


def _contract_outputs(step: MedusaStep) -> tuple[TensorSpec, ...]:
    return contract.step_outputs(**_facts(step), tree_size=step.tree.size)


def _facts(step: MedusaStep) -> dict[str, Any]:
    return {
        **asdict(step.cache_shape),
        "tree_depth": step.tree.max_depth,
        "dtype": str(step.model.dtype).removeprefix("torch."),
        "sampling": step.sampling,
    }


def _layer_prefix(step: MedusaStep) -> str:
    """What the traced names of the decoder layers' weights begin with."""
    layers = decoder_layers(step.model)
    return next(f"step.model.{name}." for name, module in step.model.named_modules() if module is layers)


def build_graph(step: MedusaStep, progress: Progress = lambda _: None) -> ir.Model:
    """Traces a step and brings the graph into the form of the contract.

    Weights stay where they are until the model is written. Whatever else a step gives (see ``StepOutput``) are named
    values of the graph, for those who build other graphs from it.

    Raises:
        ModelNotSupportedError: The model does something that a step can't honour.
        ExportError: Tracing or assembling failed.
    """
    progress("tracing")
    model = trace(step)
    progress("assembling")
    graph = model.graph
    num_caches, margin = step.cache_shape.num_caches, step.tree.max_depth

    for node in graph:
        if node.op_type == "Attention":
            node.resize_outputs(1)
    simplify(model)
    expand_sampling(model, step.model.dtype)

    outputs = {value.name: value for value in graph.outputs}
    specs = {spec.name: spec for spec in _contract_inputs(step)}
    small = [name for name in specs if not name.startswith(("past", "pending"))]
    traced_inputs, stand_ins = graph.inputs[: len(small)], graph.inputs[len(small) :]
    cache_type = stand_ins[0].type

    def new_input(name: str) -> ir.Value:
        return ir.Value(name=name, type=cache_type, shape=ir.Shape(specs[name].shape))

    caches = [new_input(contract.cache_name("past", i)) for i in range(num_caches)]
    pending: list[ir.Value] = []
    inputs = [_rename(value, name, specs[name].shape) for value, name in zip(traced_inputs, small, strict=True)]
    if margin:
        inputs.append(new_input("pending_kv"))
        split = ir.node("Split", inputs[-1:], {"axis": 1, "num_outputs": num_caches}, num_outputs=num_caches)
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
    for stand_in, value in zip(stand_ins, [caches[0], *pending[:1]], strict=True):
        ir.convenience.replace_all_uses_with(stand_in, value)

    graph.inputs.clear()
    graph.inputs.extend([*inputs, *caches])
    outputs |= {contract.cache_name("present", i): value for i, value in enumerate(present)}
    output_specs = _contract_outputs(step)
    results = [outputs[spec.name] for spec in output_specs]
    if any(value.is_graph_input() or value.is_initializer() for value in results):
        raise ExportError("An output of the step is one of its inputs unchanged.")
    graph.outputs.clear()
    graph.outputs.extend(
        _rename(value, spec.name, spec.shape) for value, spec in zip(results, output_specs, strict=True)
    )
    graph.name = "medusa_step"
    model.opset_imports.pop(MARK_DOMAIN, None)
    passes.CommonSubexpressionEliminationPass()(model)
    for rewrite in REWRITES:
        rewrite(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    return model

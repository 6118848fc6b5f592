"""Compile a ``MedusaStep`` to one standard ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common as passes

from medusa_export.common.errors import ExportError
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.graph.experts import expand_experts
from medusa_export.graph.layer_reuse import decoder_layers
from medusa_export.graph.layers import expand_layers
from medusa_export.graph.rewrites.rewrite import StepFacts
from medusa_export.graph.rewrites.standard import STANDARD
from medusa_export.graph.sampling import expand_sampling
from medusa_export.graph.stored_types import stored_types
from medusa_export.graph.trace import simplify, trace
from medusa_export.graph.translations import MARK_DOMAIN
from medusa_export.graph.weights import PREFIX, StepWeights
from medusa_export.models.activations import ActivationRanges
from medusa_export.models.supported import max_positions
from medusa_export.models.weight_types import WeightTypes
from medusa_export.step.step import MedusaStep
from medusa_runtime.bundles import contract
from medusa_runtime.bundles.contract import TensorSpec
from medusa_runtime.bundles.matrices import MatrixFacts
from medusa_runtime.bundles.states import EntryKind, groups_of


@dataclass(frozen=True)
class StepGraph:
    """The standard graph of a step.

    Attributes:
        model: The graph in the form of the contract. Weights are read when it is written.
        step: Facts about the step, for the rewrites of other graphs.
        rewrites: Number of places that each rewrite changed, by its name.
        matrices: The storage types of its matrices, by part of the model.
    """

    model: ir.Model
    step: StepFacts
    rewrites: Mapping[str, int]
    matrices: tuple[MatrixFacts, ...]


def build_graph(
    step: MedusaStep,
    on_progress: OnProgress = ignore_progress,
    *,
    weights: StepWeights | None = None,
    types: WeightTypes | None = None,
    activations: ActivationRanges | None = None,
    fused_attention: bool = False,
) -> StepGraph:
    """Traces a step and brings the graph into the form of the contract.

    Weights are not read until the graph is written. Results of a step that are no outputs (see ``StepOutput``) are
    named values of the graph. Graphs that are derived from it use them.

    Args:
        step: The step, in eval mode.
        on_progress: Receives reports.
        weights: The weights; those in the step's memory if None.
        types: The storage types of the weights; their own dtypes if None.
        activations: Ranges of the inputs of products, which round their inputs to 8 bits then.
        fused_attention: Keep ONNX Runtime's attention operators in the derived graphs (see ``StepFacts``).

    Raises:
        ModelNotSupportedError: The model needs something that a step can't honour.
        ExportError: Tracing or assembling failed.
        RewriteError: A rewrite failed.
    """
    on_progress(Progress("tracing"))
    model = trace(step)
    on_progress(Progress("assembling"))
    for node in model.graph:
        if node.op_type == "Attention":
            node.resize_outputs(1)
    simplify(model)
    expand_sampling(model, step.model.dtype)
    _bring_into_contract(model, step, weights or StepWeights(step))
    experts = expand_experts(model)
    model.opset_imports.pop(MARK_DOMAIN, None)
    passes.CommonSubexpressionEliminationPass()(model)
    # Half of the file would be stack traces of the tracer, with the paths of this machine.
    passes.ClearMetadataAndDocStringPass()(model)
    facts = StepFacts(
        margin=step.tree.max_depth,
        max_positions=max_positions(step.model),
        weights=types or WeightTypes(),
        activations=activations,
        has_experts=experts > 0,
        fused_attention=fused_attention,
    )
    rewrites = STANDARD.run(model, facts)
    return StepGraph(model, facts, rewrites, stored_types(model))


def _bring_into_contract(model: ir.Model, step: MedusaStep, weights: StepWeights) -> None:
    """Replaces the traced graph's marks by layers, and its inputs, outputs and weights by those of the contract."""
    graph = model.graph
    for name, value in graph.initializers.items():
        if name in weights:
            value.const_value = weights.tensor(name)
    groups, margin = groups_of(step.states), step.tree.max_depth
    outputs = {value.name: value for value in graph.outputs}
    specs = {spec.name: spec for spec in _contract_inputs(step)}
    small = [name for name in specs if not name.startswith(("past", "pending"))]
    traced_inputs, stand_ins = graph.inputs[: len(small)], graph.inputs[len(small) :]
    types = {group.states[0].entry: value.type for group, value in zip(groups, stand_ins, strict=False)}

    def new_input(name: str, entry: EntryKind) -> ir.Value:
        return ir.Value(name=name, type=types[entry], shape=ir.Shape(specs[name].shape))

    caches = {state.name: new_input(state.past, state.entry) for state in step.states}
    pending: dict[str, ir.Value] = {}
    inputs = [_rename(value, name, specs[name].shape) for value, name in zip(traced_inputs, small, strict=True)]
    for group in groups:
        if group.pending is not None:
            count = len(group.states)
            inputs.append(new_input(group.pending, group.states[0].entry))
            split = ir.node("Split", inputs[-1:], {"axis": 1, "num_outputs": count}, num_outputs=count)
            graph.insert_before(graph[0], split)
            pending |= zip((state.name for state in group.states), split.outputs, strict=True)

    present = expand_layers(
        model,
        layer_prefix=_layer_prefix(step),
        groups=groups,
        caches=caches,
        pending=pending,
        weight=weights.tensor,
    )

    # Readers of a stand-in read its shape only, which all states of its group have.
    firsts = [group.states[0].name for group in groups]
    values = [*(caches[name] for name in firsts), *(pending[name] for name in firsts if margin)]
    for stand_in, value in zip(stand_ins, values, strict=True):
        ir.convenience.replace_all_uses_with(stand_in, value)

    graph.inputs.clear()
    graph.inputs.extend([*inputs, *caches.values()])
    outputs |= {f"present_{name}": value for name, value in present.items()}
    _set_outputs(graph, outputs, _contract_outputs(step))
    graph.name = "medusa_step"


def _set_outputs(graph: ir.Graph, values: Mapping[str | None, ir.Value], specs: Sequence[TensorSpec]) -> None:
    """Makes values the outputs of a graph, in the order of the contract.

    Raises:
        ExportError: One of them is an input.
    """
    results = [values[spec.name] for spec in specs]
    if any(value.is_graph_input() or value.is_initializer() for value in results):
        raise ExportError("An output of the step is one of its inputs unchanged.")
    graph.outputs.clear()
    graph.outputs.extend(_rename(value, spec.name, spec.shape) for value, spec in zip(results, specs, strict=True))


def _rename(value: ir.Value, name: str, shape: Sequence[int | str]) -> ir.Value:
    value.name = name
    value.shape = ir.Shape(shape)
    return value


def _contract_inputs(step: MedusaStep) -> tuple[TensorSpec, ...]:
    return contract.step_inputs(
        step.states,
        vocab_size=step.vocab_size,
        dtype=_dtype(step),
        sampling=step.sampling,
        constraints=step.sampling,
        top_logprobs=step.sampling,
        takes_long=step.short_positions is not None,
    )


def _contract_outputs(step: MedusaStep) -> tuple[TensorSpec, ...]:
    tree = step.tree
    return contract.step_outputs(
        step.states,
        tree_depth=tree.max_depth,
        tree_size=tree.size,
        vocab_size=step.vocab_size,
        dtype=_dtype(step),
        sampling=step.sampling,
        top_logprobs=step.sampling,
    )


def _dtype(step: MedusaStep) -> str:
    return str(step.model.dtype).removeprefix("torch.")


def _layer_prefix(step: MedusaStep) -> str:
    """The start of the traced names of the decoder layers' weights."""
    layers = decoder_layers(step.model)
    return next(f"{PREFIX}model.{name}." for name, module in step.model.named_modules() if module is layers)

"""Replace each mark of ``layer_reuse`` by a copy of a traced decoder layer.

Marks of experts are copied with their layers. ``medusa_export.graph.experts`` replaces them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from medusa_export.common.errors import ExportError
from medusa_export.common.tuning import MOST_CONCATENATED
from medusa_export.graph.rewrites.building import register
from medusa_export.graph.translations import EXPERTS_MARK, MARK_DOMAIN
from medusa_runtime.bundles.states import StateGroup


@dataclass
class _Layer:
    """A traced layer.

    Attributes:
        prefix: Start of the names of its weights.
        marks: Its marks by port.
        body: The nodes between the marks, in order.
    """

    prefix: str
    marks: dict[str, ir.Node] = field(default_factory=dict)
    body: list[ir.Node] = field(default_factory=list)

    def own(self, nodes: Sequence[ir.Node]) -> list[ir.Node]:
        """The nodes between the marks that depend on the layer's inputs or weights, in the order of ``nodes``."""
        needed: set[ir.Node] = set()
        stack = [mark.inputs[0] for port, mark in self.marks.items() if not _enters(port)]
        entries = {mark.outputs[0] for port, mark in self.marks.items() if _enters(port)}
        while stack:
            value = stack.pop()
            producer = value.producer() if value is not None and value not in entries else None
            if producer is not None and producer not in needed:
                needed.add(producer)
                stack.extend(producer.inputs)
        varying = set(entries)
        own = []
        for node in nodes:
            if node in needed and any(
                value in varying or (value is not None and self.owns(value)) for value in node.inputs
            ):
                varying.update(node.outputs)
                own.append(node)
        return own

    def owns(self, value: ir.Value) -> bool:
        """True if a value is one of this layer's weights."""
        return value.is_initializer() and (value.name or "").startswith(self.prefix)

    @property
    def roles(self) -> list[str]:
        """The roles of the layer's own states: ``key`` and ``value``, with their scales or without, or none."""
        return [port.removeprefix("past_") for port in self.marks if port.startswith("past_")]

    def behind(self, port: str) -> ir.Value:
        """The value that a mark marks."""
        value = self.marks[port].inputs[0]
        assert value is not None
        return value


def _enters(port: str) -> bool:
    return port.startswith(("in", "past", "pending"))


class _Expansion:
    """Replaces marks of one graph.

    Args:
        graph: The graph.
        layer_prefix: As for ``expand_layers``.
        groups: As for ``expand_layers``.
        caches: As for ``expand_layers``.
        pending: As for ``expand_layers``.
        weight: As for ``expand_layers``.

    Attributes:
        present: The updated caches of the layers that are done, by name of the state.
        blocks: The entries that are written to these caches, by name of the state.
    """

    def __init__(
        self,
        graph: ir.Graph,
        layer_prefix: str,
        groups: Sequence[StateGroup],
        caches: Mapping[str, ir.Value],
        pending: Mapping[str, ir.Value],
        weight: Callable[[str], ir.TensorProtocol],
    ) -> None:
        self.graph = graph
        self.prefix = layer_prefix
        self.groups = groups
        self.caches = caches
        self.pending = pending
        self.weight = weight
        self.present: dict[str, ir.Value] = {}
        self.blocks: dict[str, ir.Value] = {}

    def copy(self, layer: _Layer, index: int, node: ir.Node) -> ir.Value:
        """Inserts a copy of ``layer`` as layer ``index`` before the mark ``node``, and returns its hidden state."""
        mapped: dict[ir.Value, ir.Value] = {}
        for number, value in enumerate(node.inputs):
            mark = layer.marks.get(f"in{number}")  # none where the layer ignores an argument
            if mark is not None and value is not None:
                mapped[mark.outputs[0]] = value
        for role in layer.roles:
            mapped[layer.marks[f"past_{role}"].outputs[0]] = self.caches[f"{role}_{index}"]
            if self.pending:
                mapped[layer.marks[f"pending_{role}"].outputs[0]] = self.pending[f"{role}_{index}"]
        copies = [self._copy_node(original, layer, index, mapped) for original in layer.body]
        self.graph.insert_before(node, copies)
        self._note(index, layer, mapped)
        return mapped[layer.behind("hidden")]

    def _copy_node(self, original: ir.Node, layer: _Layer, index: int, mapped: dict[ir.Value, ir.Value]) -> ir.Node:
        for value in original.inputs:
            if value is not None and value not in mapped and layer.owns(value):
                mapped[value] = self._weight(f"{self.prefix}{index}." + (value.name or "").removeprefix(layer.prefix))
        copy = ir.Node(
            original.domain,
            original.op_type,
            [None if value is None else mapped.get(value, value) for value in original.inputs],
            list(original.attributes.values()),
            overload=original.overload,
            num_outputs=len(original.outputs),
            name=f"layers.{index}/{original.name}",
        )
        for old, new in zip(original.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = f"layers.{index}/{old.name}", old.type, old.shape
            mapped[old] = new
        return copy

    def _weight(self, name: str) -> ir.Value:
        if name not in self.graph.initializers:
            register(self.graph, self.weight(name))
        return self.graph.initializers[name]

    def keep(self, index: int, layer: _Layer) -> None:
        """Connects a traced layer to its caches. Its nodes stay where they are."""
        for role in layer.roles:
            layer.marks[f"past_{role}"].replace_input_with(0, self.caches[f"{role}_{index}"])
            if self.pending:
                layer.marks[f"pending_{role}"].replace_input_with(0, self.pending[f"{role}_{index}"])
        self._note(index, layer, {})

    def _note(self, index: int, layer: _Layer, mapped: dict[ir.Value, ir.Value]) -> None:
        for role in layer.roles:
            present = layer.behind(f"present_{role}")
            self.present[f"{role}_{index}"] = mapped.get(present, present)
            if self.pending:  # without pending entries no block has a mark
                block = layer.behind(f"block_{role}")
                self.blocks[f"{role}_{index}"] = mapped.get(block, block)

    def concat_blocks(self, node: ir.Node) -> None:
        """Replaces the mark of the blocks of a group by their concatenation, in parts if they are many."""
        group = node.attributes["group"].as_int()
        blocks: list[ir.Value] = [self.blocks[state.name] for state in self.groups[group].states]
        name = f"concat_blocks_{group}"
        while len(blocks) > MOST_CONCATENATED:
            starts = range(0, len(blocks), MOST_CONCATENATED)
            parts = [
                ir.node("Concat", blocks[start : start + MOST_CONCATENATED], {"axis": 1}, name=f"{name}_from_{start}")
                for start in starts
            ]
            self.graph.insert_before(node, parts)
            blocks = [part.outputs[0] for part in parts]
        concat = ir.node("Concat", blocks, {"axis": 1}, name=name)
        self.graph.insert_before(node, concat)
        _remove(self.graph, node, concat.outputs[0])


def _remove(graph: ir.Graph, mark: ir.Node, instead: ir.Value | None) -> None:
    """Removes a mark. Readers of its output read ``instead``."""
    assert instead is not None
    ir.convenience.replace_all_uses_with(mark.outputs[0], instead, replace_graph_outputs=True)
    graph.remove(mark, safe=True)


def expand_layers(
    model: ir.Model,
    *,
    layer_prefix: str,
    groups: Sequence[StateGroup],
    caches: Mapping[str, ir.Value],
    pending: Mapping[str, ir.Value],
    weight: Callable[[str], ir.TensorProtocol],
) -> dict[str, ir.Value]:
    """Replaces all marks.

    Args:
        model: The traced graph; changed in place.
        layer_prefix: Start of the names of weights of layer i, before ``i.``.
        groups: The model's states, by shape and type.
        caches: The inputs with the caches, by name of the state.
        pending: The pending entries of each cache, by name of the state; empty if the step has none.
        weight: Returns the weight of a name.

    Returns:
        The updated caches, by name of the state.

    Raises:
        ExportError: A mark could not be replaced.
    """
    graph = model.graph
    marks = [node for node in graph if node.domain == MARK_DOMAIN]
    layers: dict[int, _Layer] = {}
    for node in marks:
        if node.op_type == "LayerBoundary":
            index = node.attributes["layer"].as_int()
            layer = layers.setdefault(index, _Layer(f"{layer_prefix}{index}."))
            layer.marks[node.attributes["port"].as_string()] = node
    nodes = list(graph)
    for layer in layers.values():
        layer.body = layer.own(nodes)

    expansion = _Expansion(graph, layer_prefix, groups, caches, pending, weight)
    for node in marks:
        if node.op_type == "DecoderLayer":
            like = layers[node.attributes["like"].as_int()]
            _remove(graph, node, expansion.copy(like, node.attributes["layer"].as_int(), node))
    for index, layer in layers.items():
        expansion.keep(index, layer)
    for node in marks:
        if node.op_type == "ConcatBlocks":
            expansion.concat_blocks(node)
        elif node.op_type == "LayerBoundary":
            _remove(graph, node, node.inputs[0])
    left = sorted({node.op_type for node in graph if node.domain == MARK_DOMAIN} - {EXPERTS_MARK})
    if left:
        raise ExportError(f"Marks are left in the graph after its layers were placed: {', '.join(left)}.")
    return {name: expansion.present[name] for name in caches}

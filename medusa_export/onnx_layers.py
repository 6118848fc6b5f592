"""Put a copy of the right decoder layer in the place of each mark that ``layer_reuse`` left.

After this pass the graph has the inputs and outputs of the contract and no node of our own domain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from medusa_export.errors import ExportError
from medusa_export.onnx_trace import MARK_DOMAIN


@dataclass
class _Layer:
    """A traced layer: its marks by port, and the nodes between them in order."""

    prefix: str
    marks: dict[str, ir.Node] = field(default_factory=dict)
    body: list[ir.Node] = field(default_factory=list)

    def own(self, nodes: Sequence[ir.Node]) -> list[ir.Node]:
        """Of ``nodes``, in graph order, those between the marks that differ from layer to layer."""
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
                value in varying or (value is not None and self._is_weight(value)) for value in node.inputs
            ):
                varying.update(node.outputs)
                own.append(node)
        return own

    def _is_weight(self, value: ir.Value) -> bool:
        return value.is_initializer() and (value.name or "").startswith(self.prefix)


def _enters(port: str) -> bool:
    return port.startswith(("in", "past", "pending"))


def expand_layers(
    model: ir.Model,
    *,
    layer_prefix: str,
    caches: Sequence[ir.Value],
    pending: Sequence[ir.Value],
    weight: Callable[[str], ir.TensorProtocol],
) -> list[ir.Value]:
    """Replaces all marks.

    Args:
        model: The traced graph; changed in place.
        layer_prefix: What names of weights of layer i begin with, before ``i.``.
        caches: The 2L cache inputs, keys and values alternating.
        pending: For each cache its pending entries; empty if there are none.
        weight: Gives the weight of a name.

    Returns:
        The 2L updated caches.
    """
    graph = model.graph
    layers: dict[int, _Layer] = {}
    nodes = list(graph)
    for node in nodes:
        if node.domain == MARK_DOMAIN and node.op_type == "LayerBoundary":
            index = node.attributes["layer"].as_int()
            layer = layers.setdefault(index, _Layer(f"{layer_prefix}{index}."))
            layer.marks[node.attributes["port"].as_string()] = node
    for layer in layers.values():
        layer.body = layer.own(nodes)

    blocks: dict[int, ir.Value] = {}
    present: dict[int, ir.Value] = {}
    initializers = dict(graph.initializers)

    def place(layer: _Layer, index: int, node: ir.Node) -> ir.Value:
        """Copies ``layer`` in front of ``node`` as layer ``index``; gives its hidden state."""
        mapped: dict[ir.Value, ir.Value] = {}
        for number, value in enumerate(node.inputs):
            mark = layer.marks.get(f"in{number}")  # none where the layer ignores an argument
            if mark is not None and value is not None:
                mapped[mark.outputs[0]] = value
        for slot in (0, 1):
            mapped[layer.marks[f"past{slot}"].outputs[0]] = caches[2 * index + slot]
            if pending:
                mapped[layer.marks[f"pending{slot}"].outputs[0]] = pending[2 * index + slot]
        prefix = f"{layer_prefix}{index}."

        def map_value(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in mapped:
                return None if value is None else mapped[value]
            name = value.name or ""
            if value.is_initializer() and name.startswith(layer.prefix):
                new_name = prefix + name.removeprefix(layer.prefix)
                if new_name not in initializers:
                    tensor = weight(new_name)
                    new = ir.Value(
                        name=new_name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
                    )
                    graph.register_initializer(new)
                    initializers[new_name] = new
                mapped[value] = initializers[new_name]
                return mapped[value]
            return value

        copies = []
        for original in layer.body:
            copy = ir.Node(
                original.domain,
                original.op_type,
                [map_value(value) for value in original.inputs],
                list(original.attributes.values()),
                overload=original.overload,
                num_outputs=len(original.outputs),
                name=f"layers.{index}/{original.name}",
            )
            for old, new in zip(original.outputs, copy.outputs, strict=True):
                new.name, new.type, new.shape = f"layers.{index}/{old.name}", old.type, old.shape
                mapped[old] = new
            copies.append(copy)
        graph.insert_before(node, copies)
        for slot in (0, 1):
            blocks[2 * index + slot] = mapped[_mark_input(layer, f"block{slot}")]
            present[2 * index + slot] = mapped[_mark_input(layer, f"present{slot}")]
        return mapped[_mark_input(layer, "hidden")]

    for node in nodes:
        if node.domain == MARK_DOMAIN and node.op_type == "DecoderLayer":
            hidden = place(layers[node.attributes["like"].as_int()], node.attributes["layer"].as_int(), node)
            ir.convenience.replace_all_uses_with(node.outputs[0], hidden)
            graph.remove(node, safe=True)

    for index, layer in layers.items():
        for slot in (0, 1):
            blocks[2 * index + slot] = _mark_input(layer, f"block{slot}")
            present[2 * index + slot] = _mark_input(layer, f"present{slot}")
            layer.marks[f"past{slot}"].replace_input_with(0, caches[2 * index + slot])
            if pending:
                layer.marks[f"pending{slot}"].replace_input_with(0, pending[2 * index + slot])
    for node in nodes:
        if node.domain == MARK_DOMAIN and node.op_type == "ConcatBlocks":
            concat = ir.node("Concat", [blocks[i] for i in range(len(caches))], {"axis": 1}, name="concat_blocks")
            graph.insert_before(node, concat)
            ir.convenience.replace_all_uses_with(node.outputs[0], concat.outputs[0])
            graph.remove(node, safe=True)
    for layer in layers.values():
        for mark in layer.marks.values():
            ir.convenience.replace_all_uses_with(mark.outputs[0], mark.inputs[0], replace_graph_outputs=True)
            graph.remove(mark, safe=True)
    left = sorted({node.op_type for node in graph if node.domain == MARK_DOMAIN})
    if left:
        raise ExportError(f"Marks are left in the graph after its layers were placed: {', '.join(left)}.")
    return [present[i] for i in range(len(caches))]


def _mark_input(layer: _Layer, port: str) -> ir.Value:
    value = layer.marks[port].inputs[0]
    assert value is not None
    return value

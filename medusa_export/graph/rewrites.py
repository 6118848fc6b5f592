"""Rewrites that make a step graph smaller and faster without changing what it computes.

Each public function is one rewrite and says its rule. All results are standard ONNX.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node behind a value, if it is a standard operator of one of these types."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of a small constant."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None and tensor.size <= 16 else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value; None if there are more, or if it is an output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    first, second = node.inputs
    return second if first is value else first


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """``new`` takes the name, the type and the readers of ``old``."""
    new.type, new.shape = old.type, old.shape
    name, old.name = old.name, f"{old.name}/replaced"
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.name = name


def replace(old: ir.Value, nodes: list[ir.Node]) -> None:
    """Puts ``nodes`` where ``old`` is produced; the last one's first output takes its place."""
    maker = old.producer()
    assert maker is not None and maker.graph is not None
    maker.graph.insert_before(maker, nodes)
    replace_value(old, nodes[-1].outputs[0])


def fuse_rms_norm(model: ir.Model) -> int:
    """x · rsqrt(mean(x²) + ε), back in the type of x, times a weight: one ``RMSNormalization``.

    Left alone where the weight is multiplied before the result returns to a half-precision type
    (Gemma, OLMo 2), since the operator multiplies after. Gives the number of places.
    """
    count = 0
    for inverse in [node for node in model.graph if node.op_type == "Reciprocal"]:
        root = producer(inverse.inputs[0], "Sqrt")
        total = producer(root.inputs[0], "Add") if root else None
        if total is None:
            continue
        mean = producer(total.inputs[0], "ReduceMean") or producer(total.inputs[1], "ReduceMean")
        epsilon = constant(_other_input(total, mean.outputs[0])) if mean else None
        square = producer(mean.inputs[0], "Pow") if mean else None
        if mean is None or square is None or epsilon is None or epsilon.size != 1:
            continue
        axes, exponent, wide = constant(mean.inputs[1]), constant(square.inputs[1]), square.inputs[0]
        if axes is None or axes.tolist() != [-1] or exponent is None or float(exponent) != 2.0 or wide is None:
            continue
        scaled = only_user(inverse.outputs[0])
        if scaled is None or scaled.op_type != "Mul" or wide not in scaled.inputs:
            continue
        source, last = wide, scaled.outputs[0]
        widening = producer(wide, "Cast")
        if widening is not None:  # half precision: computed in fp32, returned to the type of the input
            narrowing = only_user(last)
            source = widening.inputs[0]  # type: ignore[assignment]
            if narrowing is None or narrowing.op_type != "Cast" or source is None or source.dtype is None:
                continue
            if narrowing.attributes["to"].as_int() != source.dtype.value:
                continue
            last = narrowing.outputs[0]
        weighted = only_user(last)
        if weighted is None or weighted.op_type != "Mul":
            continue
        weight = _other_input(weighted, last)
        if weight is None or weight.shape is None or len(weight.shape) != 1:
            continue
        attributes = {"axis": -1, "epsilon": float(epsilon.reshape(())), "stash_type": 1}
        replace(
            weighted.outputs[0],
            [ir.node("RMSNormalization", [source, weight], attributes, name=f"{weighted.name}/norm")],
        )
        count += 1
    return count


def fuse_rotary_embedding(model: ir.Model) -> int:
    """x · cos + rotate_half(x) · sin, with tables made of two equal halves: one ``RotaryEmbedding``.

    Gives the number of places.
    """
    halves: dict[ir.Value, ir.Value] = {}
    count = 0
    for total in [node for node in model.graph if node.op_type == "Add"]:
        left, right = producer(total.inputs[0], "Mul"), producer(total.inputs[1], "Mul")
        if left is None or right is None:
            continue
        found = _match_rotary(left, right) or _match_rotary(right, left)
        if found is None:
            continue
        source, cos, sin = found
        for table in (cos, sin):
            if table not in halves:
                halves[table] = _first_half(table)
        rotary = ir.node(
            "RotaryEmbedding", [source, halves[cos], halves[sin]], {"interleaved": 0}, name=f"{total.name}/rotary"
        )
        replace(total.outputs[0], [rotary])
        count += 1
    return count


def _match_rotary(plain: ir.Node, rotated: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x and the [B, S, d] tables, if the nodes are x · cos and rotate_half(x) · sin."""
    for turned in rotated.inputs:
        concat = producer(turned, "Concat")
        if concat is None or len(concat.inputs) != 2 or turned is None:
            continue
        negated = producer(concat.inputs[0], "Neg")
        upper = producer(negated.inputs[0], "Slice") if negated else None
        lower = producer(concat.inputs[1], "Slice")
        if upper is None or lower is None or upper.inputs[0] is not lower.inputs[0]:
            continue
        source = lower.inputs[0]
        if source not in plain.inputs or source is None or source.shape is None:
            continue
        width = source.shape[-1]
        split = constant(lower.inputs[2])
        if not isinstance(width, int) or split is None or split.tolist() != [width // 2]:
            continue
        begin = constant(upper.inputs[1])
        if begin is None or begin.tolist() != [width // 2]:
            continue
        tables = []
        for node, known in ((plain, source), (rotated, turned)):
            unsqueeze = producer(_other_input(node, known), "Unsqueeze")
            axes = constant(unsqueeze.inputs[1]) if unsqueeze else None
            if unsqueeze is None or axes is None or axes.tolist() != [1] or not _repeats(unsqueeze.inputs[0]):
                break
            tables.append(unsqueeze.inputs[0])
        if len(tables) == 2:
            return source, tables[0], tables[1]  # type: ignore[return-value]
    return None


def _repeats(table: ir.Value | None) -> bool:
    """Whether a cosine or sine table comes from angles concatenated with themselves."""
    while (node := producer(table, "Cos", "Sin", "Mul", "Cast")) is not None:
        table = node.inputs[0]
    concat = producer(table, "Concat")
    return concat is not None and len(concat.inputs) == 2 and concat.inputs[0] is concat.inputs[1]


def _first_half(table: ir.Value) -> ir.Value:
    """The first half of a table's last axis."""
    maker, width = table.producer(), table.shape[-1] if table.shape is not None else None
    assert maker is not None and maker.graph is not None and table.shape is not None and isinstance(width, int)
    split = ir.node("Split", [table], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{maker.name}/halves")
    maker.graph.insert_after(maker, split)
    half = split.outputs[0]
    half.type, half.shape = table.type, ir.Shape([*table.shape[:-1], width // 2])
    return half


def index_rows(model: ir.Model) -> int:
    """``GatherND`` by single indices along the first axis, as torch's indexing is exported: one ``Gather``.

    Gives the number of places.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == "GatherND"]:
        unsqueeze = producer(node.inputs[1], "Unsqueeze")
        axes = constant(unsqueeze.inputs[1]) if unsqueeze else None
        index = unsqueeze.inputs[0] if unsqueeze else None
        batched = "batch_dims" in node.attributes and node.attributes["batch_dims"].as_int() > 0
        if axes is None or index is None or index.shape is None or batched:
            continue
        if axes.tolist() in ([-1], [len(index.shape)]):
            gather = ir.node("Gather", [node.inputs[0], index], {"axis": 0}, name=f"{node.name}/rows")
            replace(node.outputs[0], [gather])
            count += 1
    return count


def lay_out_linears(model: ir.Model) -> int:
    """x Wᵀ of several weights for one x: one ``MatMul`` with their columns side by side, and a ``Split``.

    Every weight that is read by such products alone is stored transposed, as ``MatMul`` reads it. One that several
    products share (an ``lm_head`` that heads use too) is stored so by itself. One that is used elsewhere too (tied
    embeddings) stays as it is. Gives the number of products saved.
    """
    graph = model.graph
    groups: dict[ir.Value, list[tuple[ir.Node, ir.Value]]] = defaultdict(list)
    for node in [node for node in graph if node.op_type == "MatMul"]:
        weight, source = transposed_weight(node), node.inputs[0]
        products = _products_of(weight) if weight is not None else []
        if weight is None or source is None:
            continue
        if products == [node]:
            groups[source].append((node, weight))
        elif products:
            turned = _transposed(graph, [weight])
            for product in products:
                product.replace_input_with(1, turned)
    saved = 0
    for source, members in groups.items():
        weights = [weight for _, weight in members]
        merged = _transposed(graph, weights)
        first = members[0][0]
        if len(members) == 1:
            first.replace_input_with(1, merged)
            continue
        product = ir.node("MatMul", [source, merged], name=f"{first.name}/merged")
        sizes = np.array([weight.shape[0] for weight in weights], dtype=np.int64)  # type: ignore[index]
        lengths = ir.Value(name=f"{first.name}/sizes", const_value=ir.tensor(sizes), shape=ir.Shape([len(sizes)]))
        lengths.type = ir.TensorType(ir.DataType.INT64)
        graph.register_initializer(lengths)
        split = ir.node(
            "Split", [product.outputs[0], lengths], {"axis": -1}, num_outputs=len(members), name=f"{first.name}/split"
        )
        graph.insert_before(first, [product, split])
        for (node, _), output in zip(members, split.outputs, strict=True):
            old = node.outputs[0]
            output.type, output.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, output)
        saved += len(members) - 1
    return saved


def transposed_weight(product: ir.Node) -> ir.Value | None:
    """The weight W of a product x Wᵀ that is computed as such."""
    transpose = producer(product.inputs[1], "Transpose")
    weight = transpose.inputs[0] if transpose is not None else None
    return weight if weight is not None and weight.is_initializer() else None


def _products_of(weight: ir.Value) -> list[ir.Node]:
    """The products x Wᵀ of a weight, if nothing else reads it; else none."""
    products: list[ir.Node] = []
    for use in weight.uses():
        readers = list(use.node.outputs[0].uses()) if use.node.op_type == "Transpose" else []
        if not readers or any(reader.node.op_type != "MatMul" or reader.idx != 1 for reader in readers):
            return []
        products += [reader.node for reader in readers]
    return products


def _transposed(graph: ir.Graph, weights: list[ir.Value]) -> ir.Value:
    """An initializer of the weights' transposes side by side, made when the model is written."""
    name = "+".join(weight.name or "" for weight in weights) + ".T"
    rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]  # type: ignore[index, misc]
    tensors = [weight.const_value for weight in weights]

    def evaluate() -> ir.TensorProtocol:
        parts: list[torch.Tensor] = [tensor.raw for tensor in tensors]  # type: ignore[union-attr]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return TorchTensor(whole.detach().T.contiguous(), name)

    dtype = weights[0].dtype
    assert dtype is not None
    shape = ir.Shape([columns, rows])
    tensor = ir.LazyTensor(evaluate, dtype=dtype, shape=shape, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(dtype))
    graph.register_initializer(value)
    return value

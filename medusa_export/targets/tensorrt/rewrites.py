"""Rewrites of a step graph for TensorRT alone, applied in memory when an engine is built.

The graph stays standard ONNX and computes the same; what changes is how many layers TensorRT's parser makes of it.
ONNX Runtime never sees it. Each public function is one rewrite, says its rule and gives the number of places.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from medusa_export.graph.rewrites import constant, only_user, producer, replace
from medusa_runtime.bundles.bundle import Bundle

_SWAP = [0, 2, 1, 3]  # between [B, S, N, d] and [B, N, S, d]


def graph_for_tensorrt(bundle: Bundle, capacity: int) -> bytes:
    """A bundle's graph as TensorRT takes it: caches of a fixed capacity, few layers; weights by reference.

    Args:
        bundle: The bundle.
        capacity: C.
    """
    model = ir.load(bundle.graph)
    freeze_capacity(model, capacity)
    for rewrite in REWRITES:
        rewrite(model)
        passes.RemoveUnusedNodesPass()(model)  # what is unused still counts among the readers of a value
    passes.TopologicalSortPass()(model)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def freeze_capacity(model: ir.Model, capacity: int) -> int:
    """The dimension ``capacity`` becomes a number: TensorRT updates a cache in place only if it has a fixed length."""
    count = 0
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and any(str(size) == "capacity" for size in value.shape):
            value.shape = ir.Shape([capacity if str(size) == "capacity" else size for size in value.shape])
            count += 1
    return count


def split_heads_last(model: ir.Model) -> int:
    """The merged product of queries, keys and values goes to [B, N, S, d] in one piece, and is split there.

    In place of three ``Reshape`` and ``Transpose`` behind the ``Split``, one of each before it. Left alone where
    anything stands between (a bias of one part, a norm of queries or keys).
    """
    count = 0
    for split in [node for node in model.graph if node.op_type == "Split" and len(node.inputs) == 2]:
        source, sizes = split.inputs[0], constant(split.inputs[1])
        moved = [_moved(output) for output in split.outputs]
        heads = [_head_shape(transpose) for transpose in moved]
        if source is None or sizes is None or None in heads or len({shape[1] for shape in heads if shape}) != 1:
            continue
        head_dim = heads[0][1]  # type: ignore[index]
        name = split.name
        shape = _constant(model.graph, f"{name}/shape", np.array([0, 0, -1, head_dim], np.int64))
        counts = _constant(model.graph, f"{name}/heads", sizes // head_dim)
        reshape = ir.node("Reshape", [source, shape], {"allowzero": 0}, name=f"{name}/reshape")
        swap = ir.node("Transpose", [reshape.outputs[0]], {"perm": _SWAP}, name=f"{name}/transpose")
        parts = ir.node(
            "Split", [swap.outputs[0], counts], {"axis": 1}, num_outputs=len(moved), name=f"{name}/split_heads"
        )
        model.graph.insert_before(split, [reshape, swap, parts])
        for transpose, part in zip(moved, parts.outputs, strict=True):
            assert transpose is not None
            old = transpose.outputs[0]
            part.type, part.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, part)
        count += 1
    return count


def _moved(part: ir.Value) -> ir.Node | None:
    """The ``Transpose`` of [B, S, N, d] that alone reads a part's ``Reshape``."""
    reshape = only_user(part)
    if reshape is None or reshape.op_type != "Reshape":
        return None
    transpose = only_user(reshape.outputs[0])
    if transpose is None or transpose.op_type != "Transpose":
        return None
    return transpose if list(transpose.attributes["perm"].as_ints()) == _SWAP else None


def _head_shape(transpose: ir.Node | None) -> tuple[int, int] | None:
    """N and d of what a ``Transpose`` turns around."""
    shape = transpose.outputs[0].shape if transpose is not None else None
    if shape is None or len(shape) != 4:
        return None
    heads, head_dim = shape[1], shape[3]
    return (heads, head_dim) if isinstance(heads, int) and isinstance(head_dim, int) else None


def fold_query_groups(model: ir.Model) -> int:
    """Grouped-query attention as attention of the key/value heads alone, with the queries of a group in a row.

    TensorRT copies keys and values for each query head, the whole cache in every layer and step. But a group's heads
    read the same keys: queries [B, G · N, S, d] are [B, N, G · S, d] as they lie in memory, under a mask of G copies.
    """
    graph = model.graph
    masks: dict[tuple[ir.Value, int], ir.Value] = {}
    count = 0
    for node in [node for node in graph if node.op_type == "Attention"]:
        query, key, _, mask = node.inputs[:4]
        result = node.outputs[0]
        if query is None or key is None or mask is None or query.shape is None or key.shape is None:
            continue
        queries, heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        if not (isinstance(queries, int) and isinstance(heads, int) and isinstance(head_dim, int)) or queries == heads:
            continue
        groups = queries // heads
        if (mask, groups) not in masks:
            tiled = ir.node("Concat", [mask] * groups, {"axis": 2}, name=f"{mask.name}/for_{groups}_groups")
            graph.insert_before(node, tiled)
            masks[mask, groups] = tiled.outputs[0]
        into = _constant(graph, f"to_{heads}_heads_of_{head_dim}", np.array([0, heads, -1, head_dim], np.int64))
        back = _constant(graph, f"to_{queries}_heads_of_{head_dim}", np.array([0, queries, -1, head_dim], np.int64))
        fold = ir.node("Reshape", [query, into], {"allowzero": 0}, name=f"{node.name}/fold_groups")
        unfold = ir.node("Reshape", [result, back], {"allowzero": 0}, name=f"{node.name}/unfold_groups")
        graph.insert_before(node, fold)
        graph.insert_after(node, unfold)
        node.replace_input_with(0, fold.outputs[0])
        node.replace_input_with(3, masks[mask, groups])
        fold.outputs[0].type = query.type
        unfold.outputs[0].type, unfold.outputs[0].shape = result.type, result.shape
        ir.convenience.replace_all_uses_with(result, unfold.outputs[0])
        unfold.replace_input_with(0, result)  # it is one of the uses
        result.shape = None
        count += 1
    return count


def spell_out_soft_caps(model: ir.Model) -> int:
    """``Attention`` with a soft cap, which TensorRT's has not, as products and a softmax in fp32; groups are folded."""
    graph = model.graph
    count = 0
    for node in [node for node in graph if node.op_type == "Attention" and _float(node, "softcap")]:
        query, key, value, mask = node.inputs[:4]
        result = node.outputs[0]
        assert query is not None and key is not None and value is not None and mask is not None
        kind, cap = key.dtype, _float(node, "softcap")
        assert kind is not None
        scale = _constant(
            graph, f"scale_{_float(node, 'scale'):g}", np.full([1] * 4, _float(node, "scale") / cap, np.float32)
        )
        capped = _constant(graph, f"cap_{cap:g}", np.full([1] * 4, cap, np.float32))
        lowest = _constant(graph, "lowest", np.full([1] * 4, np.finfo(np.float32).min, np.float32))
        nodes: list[ir.Node] = []
        add = _chain(nodes, node.name or "attention")
        turned = add("Transpose", [key], perm=[0, 1, 3, 2])
        scores = add("Cast", [add("MatMul", [query, turned])], to=int(ir.DataType.FLOAT))
        scores = add("Mul", [add("Tanh", [add("Mul", [scores, scale])]), capped])
        weights = add("Softmax", [add("Where", [mask, scores, lowest])], axis=-1)
        add("MatMul", [add("Cast", [weights], to=int(kind)), value])
        replace(result, nodes)
        count += 1
    return count


def _float(node: ir.Node, name: str) -> float:
    """An attribute of a node; 0 if it has none."""
    return node.attributes[name].as_float() if name in node.attributes else 0.0


def _chain(nodes: list[ir.Node], name: str) -> Callable[..., ir.Value]:
    """A function that appends a node, and gives its output."""

    def add(op_type: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes, name=f"{name}/{op_type}{len(nodes)}"))
        return nodes[-1].outputs[0]

    return add


def spell_out_rms_norms(model: ir.Model) -> int:
    """``RMSNormalization`` as the operators that the parser makes of it, with constants of the type and rank to add.

    The parser's own version, 13 layers, casts and reshapes its constants; this has 10. Computed in fp32, as there.
    """
    graph = model.graph
    count = 0
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        source, weight = norm.inputs[0], norm.inputs[1]
        axis = norm.attributes["axis"].as_int() if "axis" in norm.attributes else -1
        if source is None or weight is None or source.shape is None or source.dtype is None or axis != -1:
            continue
        rank, half = len(source.shape), source.dtype != ir.DataType.FLOAT
        epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
        axes = _constant(graph, "last_axis", np.array([-1], np.int64))
        added = _constant(graph, f"epsilon_{epsilon:g}_{rank}", np.full([1] * rank, epsilon, np.float32))
        nodes: list[ir.Node] = []
        add = _chain(nodes, norm.name or "norm")
        wide = add("Cast", [source], to=int(ir.DataType.FLOAT)) if half else source
        mean = add("ReduceMean", [add("Mul", [wide, wide]), axes], keepdims=1)
        normed = add("Div", [wide, add("Sqrt", [add("Add", [mean, added])])])
        normed = add("Cast", [normed], to=int(source.dtype)) if half else normed
        normed.type, normed.shape = source.type, source.shape
        add("Mul", [normed, weight])
        replace(norm.outputs[0], nodes)
        count += 1
    return count


def pick_parts(model: ir.Model) -> int:
    """Parts of a tensor by a ``Gather`` each in place of a ``Split``.

    The parser makes 4 to 7 layers of each part that it slices out, and one of a gather; kernels are the same (TensorRT
    fuses either). Heads are picked by number, after ``split_heads_last``; equal parts of a last axis get an axis of
    their own first.
    """
    graph = model.graph
    count = 0
    for split in [node for node in graph if node.op_type == "Split" and len(node.inputs) == 2]:
        source, sizes = split.inputs[0], constant(split.inputs[1])
        shape = split.outputs[0].shape
        if source is None or sizes is None or shape is None:
            continue
        axis, rank = split.attributes["axis"].as_int(), len(shape)
        nodes: list[ir.Node] = []
        add = _chain(nodes, split.name or "split")
        if rank == 4 and axis == 1:
            bounds = pairwise(np.cumsum([0, *sizes]).tolist())
            picks = [_constant(graph, f"heads_{begin}_{end}", np.arange(begin, end)) for begin, end in bounds]
        elif rank == 3 and axis in (2, -1) and len(set(sizes.tolist())) == 1:
            apart = _constant(graph, f"in_{len(sizes)}_parts", np.array([0, 0, len(sizes), -1], np.int64))
            source, axis = add("Reshape", [source, apart], allowzero=0), 2
            picks = [_constant(graph, f"part_{i}", np.array(i, np.int64)) for i in range(len(sizes))]
        else:
            continue
        for old, pick in zip(split.outputs, picks, strict=True):
            part = add("Gather", [source, pick], axis=axis)
            part.type, part.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, part)
        graph.insert_before(split, nodes)
        count += 1
    return count


def broadcast_constants(model: ir.Model) -> int:
    """Weights and numbers get the rank of what they meet, so that the parser need not reshape them: [1, 1, H].

    A weight that meets values of several ranks gets the lowest of them; more would change the shape of results. A
    number is another constant for each rank.
    """
    count = 0
    for value in list(model.graph.initializers.values()):
        uses = list(value.uses())
        kinds = {use.node.op_type for use in uses}
        matrix = kinds == {"MatMul"} and len(value.shape or ()) >= 2
        if value.const_value is not None and value.const_value.size == 1:
            meets = [(use.node, use.idx) for use in uses if use.node.op_type in _ELEMENTWISE]
            count += sum(_give_rank(model.graph, value, node, index) for node, index in meets)
        elif uses and (matrix or kinds <= {"Mul", "Add"}):
            ranks = [_ranks_beside(value, use.node) for use in uses]
            if all(ranks) and _raise_rank(value, min(map(min, ranks))):
                count += 1
    return count


_ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Min", "Max", "Where", "And", "Or"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
)


def _ranks_beside(value: ir.Value, node: ir.Node) -> list[int]:
    """The ranks of a node's other inputs; none if one of them is not known."""
    others = [other for other in node.inputs if other is not value and other is not None]
    ranks = [len(other.shape) for other in others if other.shape is not None]
    return ranks if len(ranks) == len(others) else []


def _give_rank(graph: ir.Graph, number: ir.Value, node: ir.Node, index: int) -> bool:
    """Puts a number of the rank of the widest other input of a node in the place of its input ``index``."""
    rank = max(_ranks_beside(number, node), default=0)
    if number.const_value is None or rank <= len(number.const_value.shape):
        return False
    array = number.const_value.numpy().reshape([1] * rank)
    node.replace_input_with(index, _constant(graph, f"{number.name}/rank_{rank}", array))
    return True


def _raise_rank(value: ir.Value, rank: int) -> bool:
    """Puts dimensions of 1 in front of an initializer's; the data stay where they are."""
    tensor = value.const_value
    if tensor is None or value.is_graph_output() or len(tensor.shape) >= rank:
        return False
    shape = ir.Shape([1] * (rank - len(tensor.shape)) + list(tensor.shape.numpy()))
    if isinstance(tensor, ir.ExternalTensor):
        value.const_value = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=shape, name=tensor.name,
            base_dir=tensor.base_dir,
        )  # fmt: skip
    else:
        value.const_value = ir.Tensor(
            tensor.numpy().reshape(shape.numpy()), dtype=tensor.dtype, shape=shape, name=tensor.name
        )
    value.shape = shape
    return True


def look_up_prefixes(model: ir.Model) -> int:
    """The first n rows of a table: a ``Gather`` by 0 … n - 1 in place of a ``Slice``.

    The parser makes 26 layers of a slice whose end it doesn't know, and one of a gather. Done where the graph counts
    to n already, and n is a ``Min`` with no more than the table has.
    """
    ranges = {
        node.inputs[1]: node.outputs[0]
        for node in model.graph
        if node.op_type == "Range" and _is(node.inputs[0], 0) and _is(node.inputs[2], 1)
    }
    count = 0
    for node in [node for node in model.graph if node.op_type == "Slice" and len(node.inputs) == 5]:
        table, begin, end, axes, step = node.inputs
        reshape, axis = producer(end, "Reshape"), constant(axes)
        limit = producer(reshape.inputs[0], "Min") if reshape else None
        if limit is None or table is None or table.shape is None or axis is None or axis.size != 1:
            continue
        length, rows = table.shape[int(axis[0])], ranges.get(limit.outputs[0])
        bounds = [bound for value in limit.inputs if (bound := constant(value)) is not None]
        if rows is None or not isinstance(length, int) or not any(int(bound) <= length for bound in bounds):
            continue
        if _is(begin, 0) and _is(step, 1):
            replace(node.outputs[0], [ir.node("Gather", [table, rows], {"axis": int(axis[0])}, name=node.name)])
            count += 1
    return count


def _is(value: ir.Value | None, number: int) -> bool:
    """Whether a value is a constant that holds this number alone."""
    known = constant(value)
    return known is not None and known.size == 1 and int(known.reshape(())) == number


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer by name, made on first use."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
    return graph.initializers[name]


REWRITES = (
    split_heads_last,
    fold_query_groups,
    spell_out_soft_caps,
    spell_out_rms_norms,
    pick_parts,
    broadcast_constants,
    look_up_prefixes,
)

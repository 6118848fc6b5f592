"""Change the layout of queries, keys and values together."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import only_user, replace_value, shape_of
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.constants import integers
from medusa_export.targets.onnxruntime.heads_layout import SWAP

Heads = tuple[ir.Value, ...]


class SplitHeadsTogether(Rewrite):
    """Splits the rows of a merged projection by heads after a change of their layout, not before.

    1. Queries, keys and values [B, S, n · d], which are split and then transposed to [B, n, S, d] each, are transposed
       together, then split along the axis of heads.
    2. Parts that follow each other and are rotated by the same angles are rotated together, then split.

    A kernel for CUDA takes some microseconds, however small its tensors are. The count is the number of projections.

    Precondition: Parts have one head_dim, and nothing else reads them.
    """

    name = "split_heads_together"

    def apply(self, model: ir.Model) -> int:
        count = 0
        for split in [node for node in model.graph if node.op_type == "Split"]:
            heads = _heads(split)
            if heads is not None:
                _split_after(model.graph, split, heads)
                count += 1
        return count


def _heads(split: ir.Node) -> Heads | None:
    """The parts of a projection, each transposed to [B, n, S, d]; None if anything else happens to one of them."""
    found = []
    for part in split.outputs:
        reshape = only_user(part)
        transpose = only_user(reshape.outputs[0]) if reshape is not None and reshape.op_type == "Reshape" else None
        if transpose is None or transpose.op_type != "Transpose":
            return None
        if tuple(transpose.attributes["perm"].as_ints()) != SWAP:
            return None
        found.append(transpose.outputs[0])
    sizes = [shape_of(heads)[1::2] for heads in found]
    if not all(isinstance(size, int) for pair in sizes for size in pair) or len({pair[1] for pair in sizes}) > 1:
        return None
    return tuple(found)


def _split_after(graph: ir.Graph, split: ir.Node, heads: Heads) -> None:
    """Replaces a split and the operators that turn its parts into heads."""
    head_dim = shape_of(heads[0])[3]
    assert isinstance(head_dim, int)
    build = Builder(graph)
    shape = integers(graph, f"heads_of_{head_dim}", [0, 0, -1, head_dim])
    turned = build("Transpose", [build("Reshape", [split.inputs[0], shape])], perm=SWAP)
    groups = _rotated_alike(heads)
    nodes, outputs = _split(graph, turned, [sum(map(_number, group)) for group in groups])
    build.nodes += nodes
    for group, output in zip(groups, outputs, strict=True):
        if len(group) == 1:
            replace_value(group[0], output)
            continue
        rotations = [rotation for part in group if (rotation := _rotation(part)) is not None]
        rotated = build("RotaryEmbedding", [output, *rotations[0].inputs[1:]])
        build.nodes[-1].attributes.update(rotations[0].attributes)
        nodes, parts = _split(graph, rotated, [_number(part) for part in group])
        build.nodes += nodes
        for rotation, part in zip(rotations, parts, strict=True):
            replace_value(rotation.outputs[0], part)
    graph.insert_after(split, build.nodes)


def _rotated_alike(heads: Heads) -> list[Heads]:
    """Groups neighbours that are rotated by the same angles. All others are groups of one."""
    groups: list[Heads] = []
    last: ir.Node | None = None
    for part in heads:
        rotation = _rotation(part)
        if rotation is not None and last is not None and _angles(rotation) == _angles(last):
            groups[-1] += (part,)
        else:
            groups.append((part,))
        last = rotation
    return groups


def _rotation(part: ir.Value) -> ir.Node | None:
    """The ``RotaryEmbedding`` that alone reads a part; None if there is none."""
    user = only_user(part)
    return user if user is not None and user.domain == "" and user.op_type == "RotaryEmbedding" else None


def _angles(rotation: ir.Node) -> tuple[object, ...]:
    return (*rotation.inputs[1:], *sorted((name, attribute.value) for name, attribute in rotation.attributes.items()))


def _number(heads: ir.Value) -> int:
    number = shape_of(heads)[1]
    assert isinstance(number, int)
    return number


def _split(graph: ir.Graph, tensor: ir.Value, sizes: list[int]) -> tuple[list[ir.Node], list[ir.Value]]:
    """Splits [B, n, S, d] along the axis of heads, unless there is one part."""
    if len(sizes) == 1:
        return [], [tensor]
    given_sizes = integers(graph, f"split_{'_'.join(map(str, sizes))}", sizes)
    node = ir.node("Split", [tensor, given_sizes], {"axis": 1}, num_outputs=len(sizes))
    return [node], list(node.outputs)

"""Read keys and values once for all query heads that share them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import given, replace_value, shape_of
from medusa_export.graph.rewrites.rewrite import NotApplicableError, Rewrite
from medusa_export.targets.onnxruntime.attentions import attentions, reads_integers
from medusa_export.targets.onnxruntime.biases import bias_of
from medusa_export.targets.onnxruntime.constants import integers


class ReadSharedHeadsOnce(Rewrite):
    """Turns query heads that share a key head into further tokens of one head, and masks into biases.

    1. A mask of ``Attention`` becomes a bias, once for all layers that have it. CUDA's kernels take biases, so ONNX
       Runtime would turn a mask into a bias in each layer.
    2. Queries [B, N, S, d] become [B, Nk, N / Nk · S, d], and the output is turned back. Both have their elements in
       the same order, so nothing is moved. For heads in groups, ONNX Runtime's kernels for CUDA first copy the whole
       cache once per query head.

    The count is the number of attentions.

    Precondition: Caches are in fp32 or fp16. The backend takes no others, so the graph would only take space.
    """

    name = "read_shared_heads_once"

    def requires(self, model: ir.Model) -> None:
        for node in attentions(model):
            if reads_integers(node):
                raise NotApplicableError("keys and values are 8-bit integers, and onnxruntime-cuda does not take them")
            if given(node.inputs[0]).dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                raise NotApplicableError("the bundle is neither fp32 nor fp16, and onnxruntime-cuda takes no other")

    def apply(self, model: ir.Model) -> int:
        found = attentions(model)
        biases: dict[tuple[ir.Value, int, int], ir.Value] = {}
        for node in found:
            query, key, _, mask = (given(tensor) for tensor in node.inputs[:4])
            heads, kv_heads = shape_of(query)[1], shape_of(key)[1]
            assert isinstance(heads, int) and isinstance(kv_heads, int) and query.dtype is not None
            form = (mask, heads, kv_heads)
            if form not in biases:
                biases[form] = _bias(model.graph, mask, query.dtype, heads // kv_heads, kv_heads)
            node.replace_input_with(3, biases[form])
            if heads != kv_heads:
                _merge_groups(model.graph, node, heads, kv_heads)
        return len(found)


def _merge_groups(graph: ir.Graph, node: ir.Node, heads: int, kv_heads: int) -> None:
    """Turns the query heads of one attention into further tokens."""
    output = node.outputs[0]
    before, after = Builder(graph), Builder(graph)
    node.replace_input_with(
        0, before("Reshape", [node.inputs[0], _split_heads(graph, given(node.inputs[0]), kv_heads)])
    )
    split = after("Reshape", [None, _split_heads(graph, output, heads)])
    replace_value(output, split)
    after.nodes[0].replace_input_with(0, output)
    output.shape = None  # it was that of all heads
    graph.insert_before(node, before.nodes)
    graph.insert_after(node, after.nodes)


def _split_heads(graph: ir.Graph, tensor: ir.Value, heads: int) -> ir.Value:
    """The shape [B, heads, tokens, d] of a tensor of as many elements."""
    size = shape_of(tensor)[3]
    assert isinstance(size, int)
    return integers(graph, f"heads_{heads}_{size}", [0, heads, -1, size])


def _bias(graph: ir.Graph, mask: ir.Value, dtype: ir.DataType, groups: int, kv_heads: int) -> ir.Value:
    """The bias [B, 1 or Nk, groups · S, C] of queries whose groups are tokens.

    Where a query doesn't look, it is half of the least number: a sum with a score is finite, and its weight is 0.
    """
    bias = bias_of(graph, mask, dtype, unseen=float(np.finfo(dtype.numpy()).min / 2))
    maker, build = bias.producer(), Builder(graph)
    assert maker is not None
    if groups > 1:
        if shape_of(mask)[1] == 1:
            bias = build("Concat", [bias] * groups, axis=-2)
        else:  # each head has a bias of its own: ALiBi
            bias = build("Reshape", [bias, integers(graph, f"bias_{kv_heads}", [0, kv_heads, -1, 0])])
    graph.insert_after(maker, build.nodes)
    return bias

"""Find the best token in two steps."""

from __future__ import annotations

import math

import onnx_ir as ir

from medusa_export.common.tuning import FEWEST_BLOCKS
from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import replace, shape_of, value_named
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.constants import integers


class SplitArgMax(Rewrite):
    """Searches the best block of logits only. ``ReduceMax`` is vectorized in ONNX Runtime, and ``ArgMax`` is not.

    1. ``ArgMax`` of logits [B, S, V] becomes ``ReduceMax`` over blocks, ``ArgMax`` over their maxima, and ``ArgMax``
       within the best block. Of equal logits the first still wins.

    Logits that are not fp32, or whose V has no divisor between 8 and √V, stay as they are.
    """

    name = "split_argmax"

    def apply(self, model: ir.Model) -> int:
        graph = model.graph
        logits = value_named(graph, "logits")
        vocab_size = shape_of(logits)[-1]
        assert isinstance(vocab_size, int)
        blocks = next(count for count in range(math.isqrt(vocab_size), 0, -1) if vocab_size % count == 0)
        if logits.dtype != ir.DataType.FLOAT or blocks < FEWEST_BLOCKS:
            return 0
        found = [use.node for use in logits.uses() if use.node.op_type == "ArgMax"]
        for argmax in found:
            width = integers(graph, "block", vocab_size // blocks)
            make = Builder(graph)
            parted = make("Reshape", [logits, integers(graph, "blocks", [0, 0, blocks, vocab_size // blocks])])
            best = make("ReduceMax", [parted, integers(graph, "last_of_four", [3])], keepdims=0)
            block = make("ArgMax", [best], axis=-1, keepdims=1)
            inside = make("ArgMax", [make("GatherND", [parted, block], batch_dims=2)], axis=-1, keepdims=0)
            first = make("Mul", [make("Squeeze", [block, integers(graph, "last_of_three", [2])]), width])
            make("Add", [first, inside])
            replace(argmax.outputs[0], make.nodes)
        return len(found)

"""Skip the computation of masks in plain steps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from medusa_export.common.tuning import TABLE_SLACK
from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import given
from medusa_export.graph.rewrites.rewrite import Rewrite
from medusa_export.targets.onnxruntime.biases import biases, filled_slots
from medusa_export.targets.onnxruntime.branches import branch, is_plain_step
from medusa_export.targets.onnxruntime.constants import IR_VERSION, initializer, integers

_MASK_INPUTS = ("input_ids", "num_tokens", "is_prefill", "cache_lengths")


class SkipMasksInPlainSteps(Rewrite):
    """Cuts the bias of a plain step from a table.

    1. Where the one token of a plain step sees all committed entries, whatever the length, the bias [1, 1, 1, filled
       slots] is a slice of a constant. The ``If`` computes the mask in all other steps.

    A mask with a sliding window stays as it is. It is found by computing masks of several lengths.

    Precondition: ``FuseGroupQueryAttention`` or ``MakeAttentionRowExact`` has made the biases.
    """

    name = "skip_masks_in_plain_steps"

    def apply(self, model: ir.Model) -> int:
        graph, margin = model.graph, self.step.margin
        full = [bias for bias in biases(graph) if self._sees_all(graph, bias)]
        for bias in full:
            _skip(graph, bias, margin, margin + self.step.max_positions + TABLE_SLACK)
        return len(full)

    def _sees_all(self, graph: ir.Graph, bias: ir.Value) -> bool:
        """Returns True if the one token of a plain step sees all slots behind the margin, whatever the length."""
        margin = self.step.margin
        where = bias.producer()
        assert where is not None
        mask = given(where.inputs[0])
        inputs = [value for value in graph.inputs if value.name in _MASK_INPUTS]
        part = ir.convenience.extract(graph, inputs=inputs, outputs=[mask])
        model = ir.external_data.load_to_model(ir.Model(part, ir_version=IR_VERSION))
        evaluator = ReferenceEvaluator(ir.to_proto(model))
        for length in (0, 1, self.step.max_positions - 1):  # a shorter window shows at the last
            step = {"input_ids": [[0]], "num_tokens": [1], "is_prefill": [False], "cache_lengths": [length]}
            (seen,) = evaluator.run(None, {name: np.array(step[name]) for name in _MASK_INPUTS})
            if not np.array_equal(seen.squeeze(), np.arange(margin + length + 1) >= margin):
                return False
        return True


def _skip(graph: ir.Graph, bias: ir.Value, margin: int, slots: int) -> None:
    """Puts the computation of a bias into a branch, beside a slice of a table of ``slots`` slots."""
    assert bias.dtype is not None
    table = np.zeros((1, 1, 1, slots), bias.dtype.numpy())
    table[..., :margin] = -np.inf
    plain = is_plain_step(graph)
    make = Builder(graph)
    axis, start = integers(graph, "last_axis", [3]), integers(graph, "from_zero", [0])
    cut = make("Slice", [initializer(graph, "plain_bias", table), start, filled_slots(graph), axis])
    branch(graph, "mask", plain, {"bias": bias}, {"bias": cut}, make.nodes)

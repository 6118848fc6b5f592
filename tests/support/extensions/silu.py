"""A rewrite for ONNX Runtime: one operator for the activation SiLU."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter import pattern

from medusa_export.graph.rewrites.rewrite import Rewrite


class FuseSilu(Rewrite):
    """Makes one ``QuickGelu`` of a SiLU.

    1. x · Sigmoid(x) becomes ``QuickGelu`` with alpha = 1, an operator of ONNX Runtime.
    """

    name = "fuse_silu"

    def apply(self, model: ir.Model) -> int:
        rule = pattern.RewriteRule(_silu, _quick_gelu)
        return pattern.RewriteRuleSet([rule], commute=True).apply_to_model(model)


def _silu(op, x):
    return op.Mul(x, op.Sigmoid(x))


def _quick_gelu(op, x):
    return op.QuickGelu(x, alpha=1.0, _domain="com.microsoft")

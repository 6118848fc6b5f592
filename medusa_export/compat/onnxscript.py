"""onnxscript: folding of constants that spares weights, with the rules that a decoding step needs, and a fast table.

Tried with onnxscript 0.7.2.

The optimizer folds a computation of constants, such as a transposed weight, and has no option to spare some of them. A
copy of a decoder layer must find its own weights by name, so their values are hidden while it runs. Without that, each
copy would compute with the weights of the layer that was traced.

Its default rules are tried one by one at each node, which takes a fifth of an export of a small model. Half of them are
about convolutions, and are left out here. Each of the others is tried only at nodes of its own operator. Without that,
the rule for two slices lists all nodes of the graph at each node, which takes a sixth of an export of a small model.

``unread_sources``: to list the functions that translate operations, onnxscript parses the source of each, though the
list only says in which domain it is. Without it, an export of a small model takes a tenth longer.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from onnxscript._internal.irbuilder import IRFunction
from onnxscript._internal.values import TracedOnnxFunction
from onnxscript.rewriter import MatchResult, RewritePass
from onnxscript.rewriter._matcher import SimplePatternMatcher
from onnxscript.rewriter.rules import common as rules

from medusa_export.common.tuning import LARGEST_FOLDED
from medusa_export.compat.torch import quiet_tracing

_ROUNDS = 2  # folding makes room for rules, and rules for folding


class _AtItsOperator(SimplePatternMatcher):  # type: ignore[misc]  # the library has no types
    """Finds a pattern at nodes of the operator of its first output alone."""

    _NOWHERE = MatchResult().fail("The node has another operator.")

    def match(self, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any) -> MatchResult:
        operator = self.pattern.output_nodes[0].op_identifier()
        if operator is not None and operator[1] != node.op_type:
            return self._NOWHERE
        return super().match(model, graph, node, **options)


def _at_its_operator(rule: Any) -> Any:
    """A copy of a rule that is tried at nodes of its operator alone."""
    copied = copy.copy(rule)
    copied._matcher = _AtItsOperator(rule._target_pattern)
    return copied


_RULES = tuple(
    map(
        _at_its_operator,
        (
            rules.add_0_rule,
            rules.sub_0_rule,
            rules.mul_by_1_rule,
            rules.div_by_1_rule,
            rules.no_op_cast_rule,
            rules.cast_cast_rule,
            rules.no_op_expand_rule,
            rules.no_op_transpose_rule,
            rules.transpose_transpose_rule,
            rules.flatten_to_reshape_rule,
            rules.squeeze_reshape_1d_rule,
            rules.unsqueeze_unsqueeze_rule,
            rules.reshape_reshape_rule,
            rules.materialize_reshape_shape_rule,
            rules.collapse_slice_rule,
            rules.collapse_slice2_rule,
            rules.slice_split_rule,
            rules.cast_constant_of_shape_rule,
            rules.cast_constant_of_shape_without_value_rule,
        ),
    )
)


def fold_constants(model: ir.Model, *, spared: tuple[str, ...]) -> None:
    """Folds constants and removes operations without effect, in place.

    Args:
        model: The graph.
        spared: Starts of the names of constants that are not folded.
    """
    weights = {name: value for name, value in model.graph.initializers.items() if name.startswith(spared)}
    tensors = {name: value.const_value for name, value in weights.items()}
    for value in weights.values():
        value.const_value = None
    try:
        with quiet_tracing():  # it logs a remark on each weight that has no values
            _simplify(model)
    finally:
        for name, value in weights.items():
            value.const_value = tensors[name]


@contextlib.contextmanager
def unread_sources() -> Iterator[None]:
    """Gives traced functions an empty body in place of their parsed source, while the block lasts.

    Translation calls these functions. It does not read their bodies.
    """
    parsed = TracedOnnxFunction.function_ir
    bodiless = property(lambda function: IRFunction(function.name, function.opset.domain))
    TracedOnnxFunction.function_ir = bodiless
    try:
        yield
    finally:
        TracedOnnxFunction.function_ir = parsed


def _simplify(model: ir.Model) -> None:
    passes.InlinePass()(model)
    for _ in range(_ROUNDS):
        folded = optimizer.fold_constants(
            model, onnx_shape_inference=True, input_size_limit=LARGEST_FOLDED, output_size_limit=LARGEST_FOLDED
        )
        applied = RewritePass(_RULES)(model)
        passes.RemoveUnusedNodesPass()(model)
        if not folded.modified and not applied.modified:
            break
    ir.passes.Sequential(
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)

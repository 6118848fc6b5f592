"""onnxscript: folding of constants that spares weights.

Tried with onnxscript 0.7.2.

The optimizer folds a computation of constants, such as a transposed weight, and has no option to spare some of them. A
copy of a decoder layer must find its own weights by name, so their values are hidden while it runs. Without that, each
copy would compute with the weights of the layer that was traced.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer

from medusa_export.common.tuning import LARGEST_FOLDED
from medusa_export.compat.torch import quiet_tracing


def fold_constants(model: ir.Model, *, spared: tuple[str, ...]) -> None:
    """Folds constants in place.

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
            optimizer.optimize_ir(model, input_size_limit=LARGEST_FOLDED, output_size_limit=LARGEST_FOLDED)
    finally:
        for name, value in weights.items():
            value.const_value = tensors[name]

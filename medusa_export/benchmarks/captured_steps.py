"""Steps of ONNX Runtime's CUDA provider as CUDA graphs, to measure what a capture would save.

ONNX Runtime captures a session only if no node computes on the CPU and no value is copied between CPU and GPU. In the
standard graph, sizes are computed on the CPU and copied. A session whose sizes are fixed has none of that. It runs
steps of one tree size, and holds a copy of the weights, so the runtime's backend does not use such sessions.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from medusa_runtime.backends.onnxruntime.session import CUDA, cuda_graph, import_onnxruntime
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.contract import fixed_shape
from medusa_runtime.errors import BackendError

_WARM_UP = 3


class FixedStep:
    """A greedy step of one row and of one tree size, whose inputs and outputs stay where they are.

    It verifies a tree of tokens 0 after ``length`` entries of zeros, again and again.

    Args:
        bundle: The bundle. ONNX Runtime 1.31.1 fails in one with sampling, once it knows that there are no draws.
        size: S, the nodes of the tree.
        capacity: C.
        length: Committed entries of the row.
        provider: ONNX Runtime's name of the execution provider.
        capture: Capture the step as a CUDA graph.

    Raises:
        BackendError: The session can't be opened; with ``capture``, also if it can't be captured.
    """

    def __init__(
        self, bundle: Bundle, size: int, *, capacity: int, length: int, provider: str = CUDA, capture: bool = True
    ) -> None:
        ort = import_onnxruntime()
        sizes = {name: 0 for spec in bundle.inputs for name in spec.shape if isinstance(name, str)}
        sizes |= {"batch": 1, "sequence": size, "capacity": capacity}  # nothing is drawn, edited or masked
        options = ort.SessionOptions()
        options.log_severity_level = 3
        for name, value in sizes.items():
            options.add_free_dimension_override_by_name(name, value)
        on_gpu = provider == CUDA
        settings = {"use_tf32": "0", "enable_cuda_graph": str(int(capture))} if on_gpu else {}
        try:
            self._session = ort.InferenceSession(
                str(cuda_graph(bundle)),
                options,
                providers=[(provider, settings)],
                disabled_optimizers=["EliminateSlice"],
                enable_fallback=0,
            )
        except Exception as error:  # its exceptions share no base of their own
            raise BackendError(f"ONNX Runtime can't open steps of {size} nodes: {error}") from error
        self._binding = self._session.io_binding()
        values: dict[str, Any] = {}
        device = "cuda" if on_gpu else "cpu"
        for spec in (*bundle.inputs, *bundle.outputs):
            values[spec.name] = ort.OrtValue.ortvalue_from_numpy(
                np.full(fixed_shape(spec, sizes), _value(spec.name, size, length), spec.dtype), device, 0
            )
        for state in bundle.states:
            values[state.present] = values[state.past]  # written in place
        for spec in bundle.inputs:
            self._binding.bind_ortvalue_input(spec.name, values[spec.name])
        for spec in bundle.outputs:
            self._binding.bind_ortvalue_output(spec.name, values[spec.name])

    def run(self) -> None:
        """Runs the step, and waits for it.

        Raises:
            BackendError: ONNX Runtime failed.
        """
        try:
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        except Exception as error:  # its exceptions share no base of their own
            raise BackendError(f"ONNX Runtime failed in a step of fixed sizes: {error}") from error


def _value(name: str, size: int, length: int) -> float:
    return {"num_tokens": size, "cache_lengths": length, "top_p": 1}.get(name, 0)


def captured_step_ms(
    bundle: Bundle, size: int, *, capacity: int, length: int, repeats: int, provider: str = CUDA
) -> dict[str, float]:
    """Median milliseconds of a step of fixed sizes, ``captured`` as a CUDA graph and ``launched`` kernel by kernel.

    Args:
        bundle: The bundle.
        size: Nodes of the tree.
        capacity: Slots of the row.
        length: Committed entries of the row.
        repeats: The number of steps to measure.
        provider: ONNX Runtime's name of the execution provider.

    Raises:
        BackendError: ONNX Runtime refuses one of them.
    """
    found = {}
    for name, capture in (("launched", False), ("captured", True)):
        step = FixedStep(bundle, size, capacity=capacity, length=length, provider=provider, capture=capture)
        seconds = []
        for _ in range(_WARM_UP + repeats):
            started = time.perf_counter()
            step.run()
            seconds.append(time.perf_counter() - started)
        found[name] = 1000 * statistics.median(seconds[_WARM_UP:])
        del step
    return found

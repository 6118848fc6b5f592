"""Runs a bundle on ONNX Runtime's CUDA provider over the stubs, and prints what it does as JSON.

It needs a process of its own, which finds the stubs and ``onnxruntime-gpu`` before anything else. Usage: ``python -m
support.stub_cuda.measure BUNDLE [ROWS]``.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime

from medusa_export.benchmarks.captured_steps import FixedStep
from medusa_export.benchmarks.placement import nodes_elsewhere
from medusa_runtime import BackendError, Bundle
from medusa_runtime.backends.onnxruntime.cuda import OnnxRuntimeCudaBackend
from medusa_runtime.sampling import Draws, SamplingParams

_COUNTERS = (
    "launches", "empty_launches", "synchronizations", "captures", "replays", "to_device", "to_host", "on_device",
    "bytes_to_device", "bytes_to_host", "bytes_on_device",
)  # fmt: skip


class Stub:
    """The counters of the stub of CUDA's runtime."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcudart.so.13")

    def counts(self) -> Counter[str]:
        """All counters by name."""
        return Counter({name: ctypes.c_long.in_dll(self._library, f"stub_{name}").value for name in _COUNTERS})

    def kernels(self) -> dict[str, int]:
        """Launches by kernel since the last call."""
        with tempfile.NamedTemporaryFile() as file:
            self._library.stub_write_kernels(file.name.encode())
            lines = Path(file.name).read_text().splitlines()
        return {name: int(count) for count, name in (line.split(" ", 1) for line in lines)}


def measure(bundle: Bundle, rows: int) -> dict[str, Any]:
    """Where a bundle's nodes run, and what steps of several kinds do."""
    onnxruntime.set_default_logger_severity(3)
    stub, found = Stub(), {"version": onnxruntime.__version__, "elsewhere": nodes_elsewhere(bundle), "steps": []}
    backend = OnnxRuntimeCudaBackend(bundle, rows=rows, threads=1)
    backend.reserve(1000)
    backend.step(13, {row: list(range(1, 14 - row)) for row in range(rows)})
    for draws in (False, True) if bundle.sampling else (False,):
        if draws:
            backend.assign(0, Draws(SamplingParams(seed=1), 13, bundle.model.vocab_size))
        for size in (1, 1, 4, bundle.tree.size, bundle.tree.size):
            backend.lengths[:], backend.drafts[:] = 13, 0  # kernels of the stub leave anything
            stub.kernels()
            before = stub.counts()
            backend.step(size)
            step = dict(stub.counts() - before)
            found["steps"].append({"size": size, "draws": draws, **step, "kernels": stub.kernels()})
    backend.close()
    found["captured"] = captured(bundle, stub)
    return found


def captured(bundle: Bundle, stub: Stub) -> dict[str, Any]:
    """The calls of steps of fixed sizes once they are captured as CUDA graphs, or why they can't be."""
    try:
        step = FixedStep(bundle, bundle.tree.size, capacity=256, length=13)
        for _ in range(3):  # until it is captured
            step.run()
    except BackendError as error:
        return {"refused": str(error)}
    before = stub.counts()
    for _ in range(5):
        step.run()
    return dict(stub.counts() - before) | {"captures": before["captures"]}


if __name__ == "__main__":
    print(json.dumps(measure(Bundle.load(sys.argv[1], check_digests=False), int((sys.argv[2:] or ["1"])[0]))))

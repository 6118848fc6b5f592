"""A machine with a stand-in for a GPU, and a compiled engine on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medusa_runtime import Bundle
from medusa_runtime.backends.tensorrt.backend import TensorRTBackend
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary
from medusa_runtime.bundles.compiled import CompiledEngine
from support.stand_in_cuda import StandInCuda
from support.stand_in_tensorrt import StandInTensorRT

PROMPTS = [[(7 * i * i + 3 + row) % 101 for i in range(length)] for row, length in enumerate((13, 6, 20))]


class Machine:
    """A stand-in for a GPU, with a compiled engine for it."""

    def __init__(self, bundle: Bundle, engine: CompiledEngine, graph: Path | None = None, **device: object) -> None:
        self.cuda = StandInCuda(**device)
        limits = engine.limits
        self.trt = StandInTensorRT(bundle, self.cuda, limits.capacity, (bundle.tree.size, limits.max_prefill), graph)
        self.library = TensorRTLibrary("tensorrt-rtx", self.trt)
        self.description = replace(engine, version=self.trt.__version__)
        self.bundle = bundle

    def backend(self, rows: int = 1) -> TensorRTBackend:
        return TensorRTBackend(self.bundle, self.description, rows=rows, library=self.library, cuda=Cuda(self.cuda))

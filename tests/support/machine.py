"""A machine with a stand-in for a GPU, and a compiled engine on it."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from medusa_runtime import Bundle
from medusa_runtime.backends.tensorrt.backend import TensorRTBackend
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary
from medusa_runtime.bundles.bundle import DESCRIPTION
from medusa_runtime.bundles.compiled import ENGINE, CompiledEngine, EngineLimits, Profile
from medusa_runtime.bundles.listed_folder import FileFacts
from support.stand_in_cuda import StandInCuda
from support.stand_in_tensorrt import StandInTensorRT

PROMPTS = [[(7 * i * i + 3 + row) % 101 for i in range(length)] for row, length in enumerate((13, 6, 20))]


def stand_in_engine(bundle: Bundle, folder: Path, limits: EngineLimits) -> CompiledEngine:
    """The description of an engine that only the stand-in can load: its file is no engine.

    Args:
        bundle: The bundle whose graph the stand-in runs.
        folder: The folder to write the file to.
        limits: The engine's limits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENGINE).write_bytes(b"a stand-in")
    rows = (1, limits.max_batch, limits.max_batch)
    profiles = (
        Profile("decode", rows, (1, bundle.tree.size, bundle.tree.size)),
        Profile("prefill", rows, (1, limits.max_prefill, limits.max_prefill)),
    )
    digest = FileFacts.of(bundle.folder / DESCRIPTION).sha256
    return CompiledEngine(folder, "tensorrt-rtx", "0.0.stand-in", ("sm89",), digest, limits, profiles)


class Machine:
    """A stand-in for a GPU, with a compiled engine for it."""

    def __init__(self, bundle: Bundle, engine: CompiledEngine, graph: Path | None = None, **device: object) -> None:
        self.cuda = StandInCuda(**device)
        limits = engine.limits
        self.trt = StandInTensorRT(bundle, self.cuda, limits.capacity, (bundle.tree.size, limits.max_prefill), graph)
        self.library = TensorRTLibrary("tensorrt-rtx", self.trt)
        self.description = replace(engine, version=self.trt.__version__)
        self.bundle = bundle

    def backend(self, rows: int = 1, device: int = 0) -> TensorRTBackend:
        cuda = Cuda(self.cuda, device)
        cuda.check_device()
        return TensorRTBackend(self.bundle, self.description, rows=rows, library=self.library, cuda=cuda)

    @property
    def left(self) -> dict[str, object]:
        """Everything that is left on the device, and all errors of use."""
        if self.cuda.context_bytes:
            gc.collect()  # an exception's frames may hold contexts
        names = (
            "blocks",
            "pinned",
            "streams",
            "events",
            "graphs",
            "executables",
            "captures",
            "context_bytes",
            "misuse",
        )
        return {name: value for name in names if (value := getattr(self.cuda, name))}

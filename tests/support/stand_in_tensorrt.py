"""A stand-in for TensorRT: the functions that the TensorRT backend calls, on the stand-in for CUDA.

ONNX Runtime computes the steps on the bundle's graph, so tokens are real. An input that shares memory with an output is
an error, except a cache. Scratch memory and outputs are filled with invalid values before each step.
"""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from medusa_runtime import Bundle
from medusa_runtime.bundles.contract import TensorSpec
from support.stand_in_cuda import StandInCuda

KINDS = {"int64": np.int64, "bool": np.bool_, "float16": np.float16, "float32": np.float32}


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(enum.Enum):
    USER_MANAGED = 2


class EngineValidity(enum.Enum):
    VALID = 0
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntFlag):
    VERSION_MISMATCH = 1
    OLD_CUDA_DRIVER = 4


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1


class RuntimeConfig:
    """``IRuntimeConfig``. A filled kernel cache holds the bytes ``kernels``."""

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        cache = SimpleNamespace(loaded=b"", serialize=lambda: b"kernels")
        cache.deserialize = lambda data: cache.__setattr__("loaded", data)
        return cache

    def set_runtime_cache(self, cache: Any) -> None:
        self.cache = cache


class ILogger:
    ERROR, INTERNAL_ERROR = "error", "internal error"


class StandInTensorRT:
    """The parts of the module ``tensorrt`` that run an engine.

    Args:
        bundle: The bundle whose graph is run.
        cuda: The device.
        capacity: Slots per row of the engine's caches, C.
        max_tokens: The most tokens S of each profile.
        graph: The graph to run instead of the bundle's.

    Attributes:
        capturable: Whether steps can be captured, as contexts report. None if they can't, and contexts don't report it.
        raises: Whether an error is an exception, as it may be in Python's bindings.
        fails: Error message of the next step; None if it succeeds.
        unloadable: Error message of loading an engine; None if it succeeds.
        invalid: The reasons for which engines are reported as invalid.
        configs: The runtime configurations of all contexts.
    """

    TensorIOMode = TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    ILogger = ILogger
    __version__ = "0.0.stand-in"

    def __init__(
        self, bundle: Bundle, cuda: StandInCuda, capacity: int, max_tokens: tuple[int, int], graph: Path | None = None
    ) -> None:
        self.bundle, self.cuda, self.capacity, self.max_tokens = bundle, cuda, capacity, max_tokens
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(graph or bundle.graph), options, providers=["CPUExecutionProvider"]
        )
        self.capturable: bool | None = True
        self.raises = False
        self.fails: str | None = None
        self.unloadable: str | None = None
        self.invalid = EngineInvalidityDiagnostics(0)
        self.configs: list[RuntimeConfig] = []
        self.executed: list[tuple[int, int]] = []  # B and S of each step that ran
        self.int64, self.bool, self.float16, self.float32 = "int64", "bool", "float16", "float32"

    def compile_at_run_time(self) -> None:
        """Behaves like TensorRT-RTX, which compiles kernels at run time."""
        self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
        self.EngineValidity, self.EngineInvalidityDiagnostics = EngineValidity, EngineInvalidityDiagnostics

    def Runtime(self, log: Any) -> Any:
        def load(data: bytes) -> StandInEngine | None:
            if self.unloadable is None:
                return StandInEngine(self, log)
            log.log(ILogger.ERROR, self.unloadable)
            return None

        runtime = SimpleNamespace(deserialize_cuda_engine=load)
        if hasattr(self, "EngineValidity"):
            validity = EngineValidity.INVALID if self.invalid else EngineValidity.VALID
            runtime.get_engine_validity = lambda data: (validity, self.invalid)
        return runtime


class StandInEngine:
    """``ICudaEngine``: inputs and outputs of the contract, with caches of fixed capacity."""

    num_optimization_profiles = 2

    def __init__(self, trt: StandInTensorRT, log: Any) -> None:
        self.trt, self.log = trt, log
        bundle = trt.bundle
        self.modes = {
            **{spec.name: TensorIOMode.INPUT for spec in bundle.inputs},
            **{spec.name: TensorIOMode.OUTPUT for spec in bundle.outputs},
        }
        self.specs: dict[str, TensorSpec] = {spec.name: spec for spec in (*bundle.inputs, *bundle.outputs)}
        self.num_io_tensors = len(self.specs)

    def get_tensor_name(self, index: int) -> str:
        return list(self.specs)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.modes[name]

    def get_tensor_dtype(self, name: str) -> str:
        return self.specs[name].dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = {"capacity": self.trt.capacity}
        return tuple(size if isinstance(size, int) else sizes.get(size, -1) for size in self.specs[name].shape)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present", "past") if name.startswith("present") else None

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1000 * (profile + 1)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: ExecutionContextAllocationStrategy | RuntimeConfig) -> StandInContext:
        if isinstance(how, RuntimeConfig):
            self.trt.configs.append(how)
            how = how.strategy
        assert how is ExecutionContextAllocationStrategy.USER_MANAGED
        return StandInContext(self)


class StandInContext:
    """``IExecutionContext``, which runs steps."""

    def __init__(self, engine: StandInEngine) -> None:
        self.engine, self.trt, self.cuda = engine, engine.trt, engine.trt.cuda
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        if self.trt.capturable is not None:
            self.is_stream_capturable = lambda stream: self.trt.capturable

    def _refuse(self, words: str) -> bool:
        if self.trt.raises:
            raise RuntimeError(words)
        self.engine.log.log(ILogger.ERROR, words)
        return False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert not self.cuda.captures
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.cuda.captures
        fixed = self.engine.get_tensor_shape(name)
        assert self.profile is not None and len(shape) == len(fixed)
        if any(size not in (-1, given) for size, given in zip(fixed, shape, strict=True)):
            return False
        if name == "input_ids" and shape[1] > self.trt.max_tokens[self.profile]:
            self.engine.log.log(ILogger.ERROR, "shape out of the profile")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self.addresses[name] = address
        return name in self.engine.specs

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.get_device_memory_size_for_profile_v2(self.profile or 0)
        self.scratch = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        if self.trt.fails is not None:
            fails, self.trt.fails = self.trt.fails, None
            return self._refuse(fails)
        if self.cuda.last_error:
            return self._refuse(f"an earlier call left {self.cuda.last_error.name}")
        if stream in self.cuda.captures and not self.trt.capturable:
            self.cuda.invalidate(stream)
            return self._refuse("a step that waits can't be captured")
        assert set(self.addresses) == set(self.engine.specs)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.cuda.put(stream, lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        batch, sequence = shapes["input_ids"]
        _, draws, _ = shapes.get("exponentials", (0, 0, 0))
        sizes = {"batch": batch, "sequence": sequence, "draws": draws, "capacity": self.trt.capacity}
        arrays = {}
        for name, spec in self.engine.specs.items():
            shape = tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape)
            arrays[name] = self.cuda.array(addresses[name], shape, KINDS[spec.dtype])
            assert shapes.get(name, shape) == shape
        outputs = [name for name, mode in self.engine.modes.items() if mode is TensorIOMode.OUTPUT]
        for output in outputs:
            for name, array in arrays.items():
                shared = name != output and np.shares_memory(array, arrays[output])
                assert shared == ({name.split("_")[0], output.split("_")[0]} == {"past", "present"} and (
                    name.split("_")[1:] == output.split("_")[1:]
                )), f"{output} shares memory with {name}"  # fmt: skip
        inputs = {name: arrays[name].copy() for name, mode in self.engine.modes.items() if mode is TensorIOMode.INPUT}
        assert self.scratch is not None
        self.cuda.array(self.scratch[0], (self.scratch[1],), np.uint8)[:] = 0xEE
        for output in outputs:
            arrays[output].view(np.uint8)[...] = 0xEE
        for output, value in zip(outputs, self.trt.session.run(outputs, inputs), strict=True):
            arrays[output][...] = value
        self.trt.executed.append((batch, sequence))

"""A stand-in for TensorRT: the functions that the TensorRT backend calls, on the stand-in for CUDA.

ONNX Runtime computes the steps on the bundle's graph, so tokens are real. An input that shares memory with an output is
an error, except a cache. Scratch memory and outputs are filled with invalid values before each step. Any call may fail
(``fault``), and all fail once CUDA's context is lost. A context that is destroyed before its steps have run is an
error. Errors of use raise ``AssertionError``, and ``StandInCuda.misuse`` keeps them.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from medusa_runtime import Bundle
from medusa_runtime.bundles.bundle import WEIGHTS
from medusa_runtime.bundles.contract import TensorSpec
from support.sessions import shared, version_of
from support.stand_in_cuda import Refused, StandInCuda

# Inputs with a free dimension besides those of ``input_ids``, the place of it, and its name in the contract.
FREE = (
    ("exponentials", 1, "draws"),
    ("edit_tokens", 2, "edits"),
    ("allowed_tokens", 1, "masks"),
    ("ranked_places", 1, "ranked"),
)
KINDS = {"int64": np.int64, "bool": np.bool_, "uint8": np.uint8, "float16": np.float16, "float32": np.float32}


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
        fault: Called with the function's name before each call of an engine or a context that can fail. Returns the
            call's error message, or None if it succeeds.
        context_size: Bytes of device memory that a context takes besides its scratch memory.
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
        path = graph or bundle.graph
        versions = version_of(path), version_of(bundle.folder / WEIGHTS)
        self.session = shared(("stand-in", *versions), lambda: _open(path))
        self.capturable: bool | None = True
        self.raises = False
        self.fails: str | None = None
        self.fault: Callable[[str], str | None] = lambda _: None
        self.context_size = 2**14
        self.unloadable: str | None = None
        self.invalid = EngineInvalidityDiagnostics(0)
        self.configs: list[RuntimeConfig] = []
        self.executed: list[tuple[int, int]] = []  # B and S of each step that ran
        self.int64, self.bool, self.uint8 = "int64", "bool", "uint8"
        self.float16, self.float32 = "float16", "float32"

    def failure(self, function: str) -> str | None:
        """The error message of a call that fails now; None if it succeeds."""
        return "an illegal memory access was encountered" if self.cuda.is_lost else self.fault(function)

    def gives_none(self, log: Any, words: str) -> None:
        """Fails in a call that gives an object."""
        if self.raises:
            raise RuntimeError(words)
        log.log(ILogger.ERROR, words)

    def compile_at_run_time(self) -> None:
        """Behaves like TensorRT-RTX, which compiles kernels at run time."""
        self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
        self.EngineValidity, self.EngineInvalidityDiagnostics = EngineValidity, EngineInvalidityDiagnostics

    def Runtime(self, log: Any) -> Any:
        def load(data: bytes) -> StandInEngine | None:
            words = self.unloadable or self.failure("deserialize_cuda_engine")
            try:
                self.cuda.take(len(data))
            except Refused:
                words = "out of memory"
            if words is None:
                engine = StandInEngine(self, log)
                self.cuda.context_bytes += len(data)
                weakref.finalize(engine, _give_back, self.cuda, len(data))
                return engine
            return self.gives_none(log, words)

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

    def create_execution_context(
        self, how: ExecutionContextAllocationStrategy | RuntimeConfig
    ) -> StandInContext | None:
        if isinstance(how, RuntimeConfig):
            self.trt.configs.append(how)
            how = how.strategy
        self.trt.cuda.require(how is ExecutionContextAllocationStrategy.USER_MANAGED, "a context with its own scratch")
        words = self.trt.failure("create_execution_context")
        try:
            self.trt.cuda.take(self.trt.context_size)
        except Refused:
            words = "Out of memory: a context can't be allocated"
        if words is not None:
            return self.trt.gives_none(self.log, words)
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
            self.is_stream_capturable = partial(_capturable, engine.trt)  # no reference to the context itself
        self.cuda.context_bytes += self.trt.context_size
        weakref.finalize(self, _give_back, self.cuda, self.trt.context_size)

    def _refuse(self, words: str) -> bool:
        if self.trt.raises:
            raise RuntimeError(words)
        self.engine.log.log(ILogger.ERROR, words)
        return False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.cuda.require(not self.cuda.captures, "a profile was chosen during a capture")
        if (words := self.trt.failure("set_optimization_profile_async")) is not None:
            return self._refuse(words)
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.cuda.require(not self.cuda.captures, "a shape was set during a capture")
        fixed = self.engine.get_tensor_shape(name)
        self.cuda.require(self.profile is not None and len(shape) == len(fixed), f"{name} got a shape of another rank")
        if (words := self.trt.failure("set_input_shape")) is not None:
            return self._refuse(words)
        if any(size not in (-1, given) for size, given in zip(fixed, shape, strict=True)):
            return False
        if name == "input_ids" and shape[1] > self.trt.max_tokens[self.profile or 0]:
            self.engine.log.log(ILogger.ERROR, "shape out of the profile")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.cuda.require(address % 256 == 0, f"{name} is not aligned")
        if (words := self.trt.failure("set_tensor_address")) is not None:
            return self._refuse(words)
        self.addresses[name] = address
        return name in self.engine.specs

    def set_device_memory(self, address: int, size: int) -> None:
        needed = self.engine.get_device_memory_size_for_profile_v2(self.profile or 0)
        self.cuda.require(size >= needed, "there is too little scratch memory")
        self.scratch = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        if self.trt.fails is not None:
            fails, self.trt.fails = self.trt.fails, None
            return self._refuse(fails)
        if (words := self.trt.failure("execute_async_v3")) is not None:
            return self._refuse(words)
        if self.cuda.last_error:
            return self._refuse(f"an earlier call left {self.cuda.last_error.name}")
        if stream in self.cuda.captures and not self.trt.capturable:
            self.cuda.invalidate(stream)
            return self._refuse("a step that waits can't be captured")
        self.cuda.require(set(self.addresses) == set(self.engine.specs), "a tensor has no address")
        self.cuda.require(self.scratch is not None, "there is no scratch memory")
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        context, cuda = weakref.ref(self), self.cuda

        def run() -> None:
            alive = context()
            cuda.require(alive is not None, "a context was destroyed before its step, or graph, has run")
            alive._run(shapes, addresses)

        cuda.put(stream, run)
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        batch, sequence = shapes["input_ids"]
        free = {name: shapes.get(tensor, (0, 0, 0))[axis] for tensor, axis, name in FREE}
        sizes = {"batch": batch, "sequence": sequence, "capacity": self.trt.capacity, **free}
        arrays = {}
        for name, spec in self.engine.specs.items():
            shape = tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape)
            arrays[name] = self.cuda.array(addresses[name], shape, KINDS[spec.dtype])
            self.cuda.require(shapes.get(name, shape) == shape, f"{name} has another shape than the step")
        inputs = [name for name, mode in self.engine.modes.items() if mode is TensorIOMode.INPUT]
        outputs = [name for name, mode in self.engine.modes.items() if mode is TensorIOMode.OUTPUT]
        self._check_sharing(arrays, outputs)
        assert self.scratch is not None
        self.cuda.array(self.scratch[0], (self.scratch[1],), np.uint8)[:] = 0xEE
        binding = self.trt.session.io_binding()
        # Caches are updated in place. All else is copied, as outputs may overwrite it.
        kept = {name: arrays[name] if name.startswith("past") else arrays[name].copy() for name in inputs}
        for name, array in kept.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name in outputs:
            if not name.startswith("present"):
                arrays[name].view(np.uint8)[...] = 0xEE
            binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(arrays[name]))
        self.trt.session.run_with_iobinding(binding)
        self.trt.executed.append((batch, sequence))

    def _check_sharing(self, arrays: dict[str, NDArray[Any]], outputs: list[str]) -> None:
        """Refuses outputs that share memory with anything but the cache that they update."""
        for output in outputs:
            for name, array in arrays.items():
                shared = name != output and np.shares_memory(array, arrays[output])
                updates = {name.split("_")[0], output.split("_")[0]} == {"past", "present"}
                own = updates and name.split("_")[1:] == output.split("_")[1:]
                self.cuda.require(shared == own, f"{output} shares memory with {name}")


def _open(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns of each cache that it copies
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _capturable(trt: StandInTensorRT, stream: int) -> bool:
    return bool(trt.capturable)


def _give_back(cuda: StandInCuda, size: int) -> None:
    cuda.context_bytes -= size

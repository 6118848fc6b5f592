"""A stand-in for a GPU: what the TensorRT backend calls of CUDA and TensorRT, in host memory.

This is no simulation of a GPU, and what passes here has not run on one. It is as strict as CUDA is about the order of
things, so that the backend's buffers and state can be tested without one:

* Work put into a stream runs when the host waits for it, never before: who reads too early reads old values.
* Memory is host memory behind addresses; a copy that leaves its block is an error, and so is an input that shares
  memory with an output, caches excepted. Scratch memory and outputs are filled with rubbish before each step.
* While a stream is captured, work is recorded and not run; waiting, allocating or preparing a context is refused.

The step itself is run by ONNX Runtime on the bundle's graph, so that tokens are real.
"""

from __future__ import annotations

import ctypes
import enum
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from medusa_runtime import Bundle
from medusa_runtime.bundles.contract import TensorSpec

KINDS = {"int64": np.int64, "bool": np.bool_, "float16": np.float16, "float32": np.float32}


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


Work = Callable[[], None]
OK = (cudaError_t.cudaSuccess,)


class Refused(Exception):
    """What the stand-in turns into an error code."""

    def __init__(self, code: cudaError_t) -> None:
        super().__init__(code.name)
        self.code = code


class StandInCuda:
    """``cuda.bindings.runtime``, as far as it is called.

    Attributes:
        calls: How often each function was called.
        fail: Errors to give, by function; each once.
        memory_limit: Bytes that may be allocated.
    """

    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, *, architecture: tuple[int, int] = (8, 9), memory_limit: int = 2**31) -> None:
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, cudaError_t] = {}
        self.memory_limit = memory_limit
        self.architecture = architecture
        self.blocks: dict[int, Any] = {}  # device memory by address
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, list[Work]] = {}
        self.captures: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.events: dict[int, Any] = {}
        self.last_error = cudaError_t.cudaSuccess
        self.invalidated: set[int] = set()  # streams whose capture is lost
        self._next = 1

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def called(*arguments: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            if name in self.fail:
                if name == "cudaStreamEndCapture":  # a capture is over even then
                    self.captures.pop(arguments[0])
                return (self.fail.pop(name), None)
            try:
                return value(*arguments)
            except Refused as refusal:
                return (refusal.code, None)

        return called

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _not_while_capturing(self) -> None:
        if self.captures:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)

    def put(self, stream: int, work: Work) -> None:
        """Puts work into a stream, or into the graph that is being captured from it."""
        (self.captures if stream in self.captures else self.streams)[stream].append(work)

    def run(self, stream: int) -> None:
        """Runs what is in a stream."""
        while self.streams[stream]:
            self.streams[stream].pop(0)()

    def block(self, address: int, size: int) -> None:
        """Refuses memory that does not lie within one block."""
        for memory in (self.blocks, self.pinned):
            for start, block in memory.items():
                if start <= address and address + size <= start + ctypes.sizeof(block):
                    return
        raise Refused(cudaError_t.cudaErrorInvalidValue)

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Device memory as an array."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        self.block(address, size)
        flat = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (size,))
        return flat.view(dtype).reshape(shape)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (*OK, 1)

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return (*OK, 0)

    def cudaGetDeviceProperties(self, _: int) -> tuple[Any, ...]:
        major, minor = self.architecture
        return (*OK, SimpleNamespace(name=b"a stand-in" + bytes(246), major=major, minor=minor))

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        self._not_while_capturing()
        if sum(map(ctypes.sizeof, self.blocks.values())) + size > self.memory_limit:
            raise Refused(cudaError_t.cudaErrorMemoryAllocation)
        return (*OK, self._memory(self.blocks, size))

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        self._not_while_capturing()
        return (*OK, self._memory(self.pinned, size))

    def _memory(self, memory: dict[int, Any], size: int) -> int:
        block = (ctypes.c_uint8 * (size + 256))()  # larger by what alignment takes
        address = -(-ctypes.addressof(block) // 256) * 256
        aligned = (ctypes.c_uint8 * size).from_buffer(block, address - ctypes.addressof(block))
        ctypes.memset(address, 0xA5, size)  # fresh memory holds rubbish
        memory[address] = aligned
        return address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        del self.blocks[address]
        return OK

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        del self.pinned[address]
        return OK

    def cudaStreamCreateWithFlags(self, _: int) -> tuple[Any, ...]:
        self.streams[number := self._number()] = []
        return (*OK, number)

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        del self.streams[stream]
        return OK

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        self._not_while_capturing()
        self.run(stream)
        return OK

    def cudaMemcpyAsync(self, target: int, source: int, size: int, _: Any, stream: int) -> tuple[Any, ...]:
        return self._copy_rows(target, size, source, size, size, 1, stream)

    def cudaMemcpy2DAsync(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, _: Any, stream: int
    ) -> tuple[Any, ...]:
        return self._copy_rows(target, target_pitch, source, source_pitch, width, rows, stream)

    def _copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: int
    ) -> tuple[Any, ...]:
        for row in range(rows):
            self.block(target + row * target_pitch, width)
            self.block(source + row * source_pitch, width)

        def copy() -> None:
            for row in range(rows):
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

        self.put(stream, copy)
        return OK

    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: int) -> tuple[Any, ...]:
        self.block(target, size)
        self.put(stream, lambda: ctypes.memset(target, value, size) and None)
        return OK

    def cudaMemset2DAsync(
        self, target: int, pitch: int, value: int, width: int, rows: int, stream: int
    ) -> tuple[Any, ...]:
        if width > pitch:
            raise Refused(cudaError_t.cudaErrorInvalidValue)
        self.block(target, (rows - 1) * pitch + width)

        def fill() -> None:
            for row in range(rows):
                ctypes.memset(target + row * pitch, value, width)

        self.put(stream, fill)
        return OK

    def cudaGetLastError(self) -> tuple[Any, ...]:
        code, self.last_error = self.last_error, cudaError_t.cudaSuccess
        return (code, None) if code else OK

    def cudaEventCreateWithFlags(self, _: int) -> tuple[Any, ...]:
        self.events[number := self._number()] = None
        return (*OK, number)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        mark = object()
        self.events[event] = (stream, mark)
        self.put(stream, lambda: self.events.__setitem__(event, None) if self.events[event] == (stream, mark) else None)
        return OK

    def cudaEventSynchronize(self, event: int) -> tuple[Any, ...]:
        while self.events[event] is not None:
            self.streams[self.events[event][0]].pop(0)()
        return OK

    def cudaEventDestroy(self, event: int) -> tuple[Any, ...]:
        del self.events[event]
        return OK

    def cudaStreamBeginCapture(self, stream: int, _: Any) -> tuple[Any, ...]:
        self._not_while_capturing()
        self.captures[stream] = []
        return OK

    def invalidate(self, stream: int) -> None:
        """Loses a capture, as a wait or an allocation in it does."""
        self.invalidated.add(stream)
        self.last_error = cudaError_t.cudaErrorStreamCaptureInvalidated

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        if stream in self.invalidated:
            self.invalidated.remove(stream)
            del self.captures[stream]
            raise Refused(cudaError_t.cudaErrorStreamCaptureInvalidated)
        self.graphs[number := self._number()] = self.captures.pop(stream)
        return (*OK, number)

    def cudaGraphInstantiate(self, graph: int, _: int) -> tuple[Any, ...]:
        self.graphs[number := self._number()] = list(self.graphs[graph])
        return (*OK, number)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return OK

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        self.streams[stream] += self.graphs[graph]
        return OK


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
    """``IRuntimeConfig``; a cache that was filled holds the word ``kernels``."""

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
    """The module ``tensorrt``, as far as an engine is run with it.

    Args:
        bundle: The bundle whose graph is run.
        cuda: The device.
        capacity: C of the engine.
        max_tokens: S of each of its profiles.
        graph: The graph to run in place of the bundle's.

    Attributes:
        capturable: Whether steps can be captured, which contexts tell; None if they can't, and nobody tells.
        raises: Whether a refusal is an exception, as it may be from Python's bindings.
        fails: Makes the next step fail with these words.
        unloadable: Makes loading an engine fail with these words.
        invalid: Why engines are said to be invalid.
        configs: The runtime configurations of the contexts that were made.
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
        """Behaves as TensorRT-RTX does."""
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
    """``ICudaEngine``: what the contract says, with fixed caches."""

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
    """``IExecutionContext``."""

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

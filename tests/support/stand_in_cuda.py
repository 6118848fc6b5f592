"""A stand-in for CUDA: the functions that the TensorRT backend calls, on host memory.

It does not simulate a GPU, and tests that pass with it have not run on a GPU. But it is as strict as CUDA about the
order of calls, so the backend's buffers and state can be tested without a GPU:

* Work in a stream runs when the host waits for it, never before. A host that reads too early reads old values. With
  ``eagerness`` some of it runs earlier, at random, as on a device that is fast at times.
* Device memory is host memory. A copy that exceeds its block is an error. Graphs take memory, too.
* While a stream is captured, work is recorded and not run. Waiting, allocating or preparing a context is refused.
* Any call may fail (``fail``, ``fault``). After ``lose`` every call fails with the same error, as after a kernel that
  wrote out of bounds.

``stand_in_tensorrt`` has the functions of TensorRT.
"""

from __future__ import annotations

import ctypes
import enum
import random
import threading
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


Work = Callable[[], None]
OK = (cudaError_t.cudaSuccess,)


class Refused(Exception):
    """Raised in the stand-in where CUDA would return an error code."""

    def __init__(self, code: cudaError_t) -> None:
        super().__init__(code.name)
        self.code = code


class StandInCuda:
    """The functions of ``cuda.bindings.runtime`` that the backend calls.

    Args:
        architecture: Compute capability, as major and minor number.
        memory_limit: Bytes of device memory.
        graph_size: Bytes of device memory that a captured graph takes.
        graph_limit: The most graphs that can exist at a time.
        eagerness: The probability that a call lets the device run a piece of work that no one has waited for.
        devices: The number of GPUs.

    Attributes:
        calls: Number of calls by function.
        fail: The error that the next call of a function returns, by function.
        misuse: Errors of use, which no caller may hide.
        fault: Called with the function's name before each call. Returns the error that the call returns, or None.
    """

    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(
        self,
        *,
        architecture: tuple[int, int] = (8, 9),
        memory_limit: int = 2**31,
        graph_size: int = 2**16,
        graph_limit: int = 2**16,
        eagerness: float = 0.0,
        devices: int = 1,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, cudaError_t] = {}
        self.fault: Callable[[str], cudaError_t | None] = lambda _: None
        self.memory_limit = memory_limit
        self.architecture = architecture
        self.graph_size, self.graph_limit, self.eagerness = graph_size, graph_limit, eagerness
        self.devices = devices
        self.current: dict[int, int] = {}  # the GPU that each thread has chosen
        self.executables: set[int] = set()  # instantiated graphs
        self.misuse: list[str] = []
        self.context_bytes = 0  # taken by TensorRT's engines and contexts
        self._random = random.Random(0)
        self._lost: cudaError_t | None = None
        self.blocks: dict[int, Any] = {}  # device memory by address
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, list[Work]] = {}
        self.captures: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.events: dict[int, Any] = {}
        self.last_error = cudaError_t.cudaSuccess
        self.invalidated: set[int] = set()  # streams whose capture is invalid
        self._next = 1

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def called(*arguments: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            if self._lost is not None:
                return (self._lost, None)
            self._run_early()
            failure = self.fail.pop(name, None) or self.fault(name)
            if failure is not None:
                if name == "cudaStreamEndCapture":  # the capture ends in spite of the error
                    self.captures.pop(arguments[0], None)
                return (failure, None)
            try:
                return value(*arguments)
            except Refused as refusal:
                return (refusal.code, None)

        return called

    def lose(self, code: cudaError_t = cudaError_t.cudaErrorIllegalAddress) -> None:
        """Makes every later call fail: CUDA's context is lost until the process ends."""
        self._lost = code

    @property
    def is_lost(self) -> bool:
        """True after ``lose``."""
        return self._lost is not None

    def _run_early(self) -> None:
        for work in self.streams.values():
            while work and self._random.random() < self.eagerness:
                work.pop(0)()

    def require(self, condition: bool, words: str) -> None:
        """Notes an error of use and raises ``AssertionError``, unless a condition holds."""
        if not condition:
            self.misuse.append(words)
            raise AssertionError(words)

    @property
    def used(self) -> int:
        """Bytes of device memory that are in use."""
        blocks = sum(map(ctypes.sizeof, self.blocks.values()))
        return blocks + len(self.executables) * self.graph_size + self.context_bytes

    def take(self, size: int) -> None:
        """Refuses to take more device memory than there is."""
        if self.used + size > self.memory_limit:
            raise Refused(cudaError_t.cudaErrorMemoryAllocation)

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _not_while_capturing(self) -> None:
        if self.captures:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)

    def put(self, stream: int, work: Work) -> None:
        """Adds work to a stream, or to the graph that is captured from the stream."""
        (self.captures if stream in self.captures else self.streams)[stream].append(work)

    def run(self, stream: int) -> None:
        """Runs all work in a stream."""
        while self.streams[stream]:
            self.streams[stream].pop(0)()

    def block(self, address: int, size: int) -> None:
        """Refuses a range of memory that is not within one block."""
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
        return (*OK, self.devices)

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        if not 0 <= device < self.devices:
            raise Refused(cudaError_t.cudaErrorInvalidDevice)
        self.current[threading.get_ident()] = device
        return OK

    def cudaGetDeviceProperties(self, _: int) -> tuple[Any, ...]:
        major, minor = self.architecture
        return (*OK, SimpleNamespace(name=b"a stand-in" + bytes(246), major=major, minor=minor))

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        self._not_while_capturing()
        self.take(size)
        return (*OK, self._memory(self.blocks, size))

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return (*OK, self.memory_limit - self.used, self.memory_limit)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        self._not_while_capturing()
        return (*OK, self._memory(self.pinned, size))

    def _memory(self, memory: dict[int, Any], size: int) -> int:
        block = (ctypes.c_uint8 * (size + 256))()  # with room to align it
        address = -(-ctypes.addressof(block) // 256) * 256
        aligned = (ctypes.c_uint8 * size).from_buffer(block, address - ctypes.addressof(block))
        ctypes.memset(address, 0xA5, size)  # so that reading memory before it is written gives wrong values
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
        """Invalidates a stream's capture, as a wait or an allocation during it does."""
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
        self.take(self.graph_size)
        if len(self.executables) == self.graph_limit:
            raise Refused(cudaError_t.cudaErrorMemoryAllocation)
        self.graphs[number := self._number()] = list(self.graphs[graph])
        self.executables.add(number)
        return (*OK, number)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return OK

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        self.executables.remove(graph)
        return self.cudaGraphDestroy(graph)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        self.streams[stream] += self.graphs[graph]
        return OK

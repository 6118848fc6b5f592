"""The calls of the CUDA runtime that the backend needs, through NVIDIA's ``cuda-bindings``.

Every failure is a ``BackendError`` with the error's name, its description and what was being done.
Addresses, streams and events are integers here.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.errors import BackendError, DeviceLostError, OutOfDeviceMemoryError

# After one of these errors every call of the process fails: CUDA's context is lost.
_LOST = {
    "cudaErrorIllegalAddress", "cudaErrorLaunchTimeout", "cudaErrorHardwareStackError", "cudaErrorIllegalInstruction",
    "cudaErrorMisalignedAddress", "cudaErrorInvalidAddressSpace", "cudaErrorInvalidPc", "cudaErrorLaunchFailure",
    "cudaErrorECCUncorrectable", "cudaErrorNvlinkUncorrectable", "cudaErrorContained", "cudaErrorAssert",
    "cudaErrorContextIsDestroyed", "cudaErrorExternalDevice", "cudaErrorTensorMemoryLeak",
}  # fmt: skip
_REMEDIES = {
    "cudaErrorInsufficientDriver": "Install an NVIDIA driver, or a newer one, that knows this CUDA version.",
    "cudaErrorNoDevice": "This machine has no NVIDIA GPU that CUDA sees: check nvidia-smi and CUDA_VISIBLE_DEVICES.",
    "cudaErrorDevicesUnavailable": "Another process holds the GPU exclusively: end it, or choose another GPU.",
    **dict.fromkeys(_LOST, "The GPU takes no more calls from this process: start it again."),
}


def import_cudart() -> Any:
    """Imports the module ``cuda.bindings.runtime``.

    Raises:
        BackendError: It is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            f"cuda-bindings can't be imported ({error}). Install it with: pip install 'medusa-export[tensorrt-rtx]' "
            "(or [tensorrt])."
        ) from error
    return runtime


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: Its product name.
        architecture: Its compute capability, such as sm89.
    """

    name: str
    architecture: str


class Cuda:
    """The CUDA runtime on one device.

    CUDA keeps a current device per thread. So each thread that calls this chooses the device with its first call.

    Args:
        runtime: The module ``cuda.bindings.runtime``.
        device: The number of the GPU among those that CUDA sees.
    """

    def __init__(self, runtime: Any, device: int = 0) -> None:
        self._runtime = runtime
        self._index = device
        self._chosen = threading.local()

    @classmethod
    def open(cls, device: int = 0) -> Cuda:
        """Opens the runtime and looks for a GPU.

        Args:
            device: The number of the GPU among those that CUDA sees.

        Raises:
            BackendError: There is no such GPU, or the driver is missing or too old.
        """
        cuda = cls(import_cudart(), device)
        cuda.check_device()
        return cuda

    def check_device(self) -> None:
        """Refuses a number that no GPU has.

        Raises:
            BackendError: There is no such GPU, or the driver is missing or too old.
        """
        self._chosen.device = True  # there may be none to choose
        count = self.call("looking for a GPU", "cudaGetDeviceCount")
        self._chosen.device = False
        if not count:
            raise BackendError(f"There is no GPU here. {_REMEDIES['cudaErrorNoDevice']}")
        if not 0 <= self._index < count:
            raise BackendError(
                f"There is no GPU {self._index}: CUDA sees {count}, which are numbered from 0. Check "
                "CUDA_VISIBLE_DEVICES."
            )

    def call(self, doing: str, name: str, *arguments: Any) -> Any:
        """Calls a function of the runtime.

        Args:
            doing: The work that the call is part of, with shapes, for the message of a failure.
            name: The function's name.
            arguments: The function's arguments.

        Raises:
            OutOfDeviceMemoryError: The device has no memory left.
            DeviceLostError: The device takes no more calls from this process.
            BackendError: The call failed otherwise.
        """
        if not getattr(self._chosen, "device", False):
            self._chosen.device = True
            try:
                self.call(f"choosing GPU {self._index}", "cudaSetDevice", self._index)
            except BackendError:
                self._chosen.device = False
                raise
        code, *results = getattr(self._runtime, name)(*arguments)
        if int(code) != 0:
            raise self._error(code, doing, name)
        return results[0] if len(results) == 1 else tuple(results)

    def constant(self, name: str) -> Any:
        """A constant or an enumeration of the runtime."""
        return getattr(self._runtime, name)

    def _error(self, code: Any, doing: str, function: str) -> BackendError:
        kind = OutOfDeviceMemoryError if code.name == "cudaErrorMemoryAllocation" else BackendError
        kind = DeviceLostError if code.name in _LOST else kind
        remedy = _REMEDIES.get(code.name, "")
        return kind(f"CUDA failed while {doing}: {function} gave {code.name} ({int(code)}). {remedy}".strip())

    @property
    def device(self) -> Device:
        """The device."""
        facts = self.call("asking for the GPU's properties", "cudaGetDeviceProperties", self._index)
        return Device(facts.name.partition(b"\0")[0].decode(), f"sm{facts.major}{facts.minor}")

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of the device's memory: free, and in all."""
        free, total = self.call("asking for the GPU's memory", "cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int, doing: str) -> int:
        """Allocates ``size`` bytes of device memory and gives their address."""
        return int(self.call(doing, "cudaMalloc", size))

    def free(self, address: int) -> None:
        """Gives device memory back."""
        self.call("freeing device memory", "cudaFree", address)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Makes a zeroed array in page-locked host memory, which the device can copy to and from by itself.

        ``unpin`` gives the memory back.
        """
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        address = int(self.call(f"allocating {size} bytes of pinned memory", "cudaMallocHost", size))
        array: NDArray[Any] = _array_at(address, size).view(dtype).reshape(shape)
        array[...] = 0
        return array

    def unpin(self, array: NDArray[Any]) -> None:
        """Gives back the memory of an array that ``pinned`` made."""
        self.call("freeing pinned memory", "cudaFreeHost", array.ctypes.data)


class Stream:
    """A queue of work on the device. It runs in order, while the host goes on.

    Args:
        cuda: The runtime.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._stream = cuda.call("making a stream", "cudaStreamCreateWithFlags", cuda.constant("cudaStreamNonBlocking"))
        kinds = cuda.constant("cudaMemcpyKind")
        self._to_device, self._to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._within = kinds.cudaMemcpyDeviceToDevice

    @property
    def handle(self) -> int:
        """The stream as an integer."""
        return int(self._stream)

    def upload(self, target: int, source: NDArray[Any], doing: str) -> None:
        """Copies a contiguous pinned array to the device."""
        arguments = (target, source.ctypes.data, source.nbytes, self._to_device, self._stream)
        self._cuda.call(doing, "cudaMemcpyAsync", *arguments)

    def download(self, target: NDArray[Any], source: int, doing: str) -> None:
        """Copies from the device to a contiguous pinned array."""
        arguments = (target.ctypes.data, source, target.nbytes, self._to_host, self._stream)
        self._cuda.call(doing, "cudaMemcpyAsync", *arguments)

    def copy(self, target: int, source: int, size: int, doing: str) -> None:
        """Copies ``size`` bytes within the device."""
        self._cuda.call(doing, "cudaMemcpyAsync", target, source, size, self._within, self._stream)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, doing: str
    ) -> None:
        """Copies ``rows`` pieces of ``width`` bytes within the device; pitches are the bytes from row to row."""
        arguments = (target, target_pitch, source, source_pitch, width, rows, self._within, self._stream)
        self._cuda.call(doing, "cudaMemcpy2DAsync", *arguments)

    def zero(self, target: int, size: int, doing: str) -> None:
        """Sets device memory to zero."""
        self._cuda.call(doing, "cudaMemsetAsync", target, 0, size, self._stream)

    def zero_rows(self, target: int, pitch: int, width: int, rows: int, doing: str) -> None:
        """Sets ``rows`` pieces of ``width`` bytes to zero; the pitch is the bytes from row to row."""
        self._cuda.call(doing, "cudaMemset2DAsync", target, pitch, 0, width, rows, self._stream)

    def synchronize(self, doing: str) -> None:
        """Waits until all work is done."""
        self._cuda.call(doing, "cudaStreamSynchronize", self._stream)

    def event(self) -> Event:
        """Makes an event that can be recorded in this stream."""
        return Event(self._cuda, self._stream)

    def capture(self, work: Callable[[], None], doing: str) -> Graph:
        """Records the work that a function puts into the stream, without running it.

        Args:
            work: The function.
            doing: The work, for the message of a failure.

        Raises:
            BackendError: A part of the work can't be captured.
        """
        mode = self._cuda.constant("cudaStreamCaptureMode").cudaStreamCaptureModeThreadLocal
        self._cuda.call(doing, "cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            self._abandon_capture()
            raise
        try:
            graph = self._cuda.call(doing, "cudaStreamEndCapture", self._stream)
        except BackendError:
            self._forget_error()
            raise
        try:
            executable = self._cuda.call(doing, "cudaGraphInstantiate", graph, 0)
        finally:
            with contextlib.suppress(BackendError):  # the step can be run all the same
                self._cuda.call(doing, "cudaGraphDestroy", graph)
        return Graph(self._cuda, executable, self._stream)

    def _abandon_capture(self) -> None:
        """Ends a capture that failed and discards it, so that the stream works again."""
        with contextlib.suppress(BackendError):
            graph = self._cuda.call("ending a capture that failed", "cudaStreamEndCapture", self._stream)
            if graph is not None and int(graph):
                self._cuda.call("ending a capture that failed", "cudaGraphDestroy", graph)
        self._forget_error()

    def _forget_error(self) -> None:
        """Clears the error that CUDA keeps after a failed capture: later calls might report it as their own."""
        with contextlib.suppress(BackendError):
            self._cuda.call("forgetting a capture that failed", "cudaGetLastError")

    def close(self) -> None:
        """Gives the stream back."""
        self._cuda.call("closing a stream", "cudaStreamDestroy", self._stream)


class Event:
    """A mark in a stream that the host can wait for; made by ``Stream.event``."""

    def __init__(self, cuda: Cuda, stream: Any) -> None:
        self._cuda, self._stream = cuda, stream
        flags = cuda.constant("cudaEventDisableTiming")
        self._event = cuda.call("making an event", "cudaEventCreateWithFlags", flags)

    def record(self, doing: str) -> None:
        """Marks the current end of the stream."""
        self._cuda.call(doing, "cudaEventRecord", self._event, self._stream)

    def wait(self, doing: str) -> None:
        """Waits until the stream has passed the mark."""
        self._cuda.call(doing, "cudaEventSynchronize", self._event)

    def close(self) -> None:
        """Gives the event back."""
        self._cuda.call("closing an event", "cudaEventDestroy", self._event)


class Graph:
    """Captured work that can be run many times; made by ``Stream.capture``."""

    def __init__(self, cuda: Cuda, graph: Any, stream: Any) -> None:
        self._cuda, self._graph, self._stream = cuda, graph, stream

    def launch(self, doing: str) -> None:
        """Puts the captured work into the stream."""
        self._cuda.call(doing, "cudaGraphLaunch", self._graph, self._stream)

    def close(self) -> None:
        """Gives the graph back."""
        self._cuda.call("closing a graph", "cudaGraphExecDestroy", self._graph)


def _array_at(address: int, size: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (size,))

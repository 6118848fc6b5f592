"""The few calls of the CUDA runtime that a backend needs, through NVIDIA's ``cuda-bindings``.

Every failure is a ``BackendError`` with the error's name, its description and what was being done.
Addresses, streams and events are integers here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.errors import BackendError, OutOfDeviceMemoryError

_REMEDIES = {
    "cudaErrorInsufficientDriver": "Install an NVIDIA driver, or a newer one, that knows this CUDA version.",
    "cudaErrorNoDevice": "This machine has no NVIDIA GPU that CUDA sees: check nvidia-smi and CUDA_VISIBLE_DEVICES.",
    "cudaErrorDevicesUnavailable": "Another process holds the GPU exclusively: end it, or choose another GPU.",
}


def import_cudart() -> Any:
    """The module ``cuda.bindings.runtime``.

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
        name: As its vendor calls it.
        architecture: Such as sm89.
    """

    name: str
    architecture: str


class Cuda:
    """The CUDA runtime on the current device.

    Args:
        runtime: The module.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    @classmethod
    def open(cls) -> Cuda:
        """The runtime, once it has found a GPU.

        Raises:
            BackendError: There is none, or the driver is missing or too old.
        """
        cuda = cls(import_cudart())
        count = cuda.call("looking for a GPU", "cudaGetDeviceCount")
        if not count:
            raise BackendError(f"There is no GPU here. {_REMEDIES['cudaErrorNoDevice']}")
        return cuda

    def call(self, doing: str, name: str, *arguments: Any) -> Any:
        """Calls a function of the runtime.

        Args:
            doing: For the message of a failure: what the call is part of, with shapes.
            name: The function.
            arguments: Its arguments.

        Raises:
            OutOfDeviceMemoryError: The device has no memory for it.
            BackendError: It failed otherwise.
        """
        code, *results = getattr(self._runtime, name)(*arguments)
        if int(code) != 0:
            raise self._error(code, doing, name)
        return results[0] if len(results) == 1 else tuple(results)

    def _error(self, code: Any, doing: str, function: str) -> BackendError:
        kind = OutOfDeviceMemoryError if code.name == "cudaErrorMemoryAllocation" else BackendError
        remedy = _REMEDIES.get(code.name, "")
        return kind(f"CUDA failed while {doing}: {function} gave {code.name} ({int(code)}). {remedy}".strip())

    @property
    def device(self) -> Device:
        """The current device."""
        index = self.call("asking for the GPU", "cudaGetDevice")
        facts = self.call("asking for the GPU's properties", "cudaGetDeviceProperties", index)
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        return Device(name, f"sm{facts.major}{facts.minor}")

    def allocate(self, size: int, doing: str) -> int:
        """``size`` bytes of device memory, zeroed."""
        address = int(self.call(doing, "cudaMalloc", size))
        self.call(doing, "cudaMemset", address, 0, size)
        return address

    def free(self, address: int) -> None:
        """Gives device memory back."""
        self.call("freeing device memory", "cudaFree", address)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A zeroed array in page-locked host memory, which the device copies to without waiting for the host.

        It is never freed: a backend makes a few, of some kilobytes.
        """
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        address = int(self.call(f"allocating {size} bytes of pinned memory", "cudaMallocHost", size))
        array = _array_at(address, size).view(dtype).reshape(shape)
        array[...] = 0
        return array


def _array_at(address: int, size: int) -> NDArray[np.uint8]:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

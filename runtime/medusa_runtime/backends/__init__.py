"""Backends run the graph of a bundle. Each one imports its own library, and only when it is opened."""

from __future__ import annotations

from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.registry import (
    AUTO,
    BackendKind,
    OpenOptions,
    backend_names,
    open_backend,
    register_backend,
    unregister_backend,
)
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.errors import BackendError

__all__ = [
    "AUTO",
    "Backend",
    "BackendKind",
    "OpenOptions",
    "backend_names",
    "open_backend",
    "register_backend",
    "unregister_backend",
]


def _open_onnxruntime(bundle: Bundle, options: OpenOptions) -> Backend:
    from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

    if options.device or options.gpu_memory is not None:
        raise BackendError("The backend onnxruntime runs on the CPU: leave device and gpu_memory out.")
    return OnnxRuntimeBackend(bundle, rows=options.rows, threads=options.threads)


def _open_onnxruntime_cuda(bundle: Bundle, options: OpenOptions) -> Backend:
    from medusa_runtime.backends.onnxruntime.cuda import OnnxRuntimeCudaBackend

    if options.device or options.gpu_memory is not None:
        raise BackendError(
            "onnxruntime-cuda runs on the first GPU that CUDA sees, and takes memory as rows grow: choose the GPU with "
            "CUDA_VISIBLE_DEVICES, and leave device and gpu_memory out, or compile the bundle with 'medusa-export trt'."
        )
    return OnnxRuntimeCudaBackend(bundle, rows=options.rows, threads=options.threads)


def _has_cuda_provider() -> bool:
    from medusa_runtime.backends.onnxruntime.session import CUDA, import_onnxruntime

    try:
        return CUDA in import_onnxruntime().get_available_providers()
    except BackendError:  # it is not installed
        return False


def _open_tensorrt(bundle: Bundle, options: OpenOptions) -> Backend:
    from medusa_runtime.backends.tensorrt.backend import TensorRTBackend

    assert options.engine is not None
    memory = options.gpu_memory
    return TensorRTBackend(bundle, options.engine, rows=options.rows, device=options.device, gpu_memory=memory)


register_backend(
    BackendKind("onnxruntime-cuda", _open_onnxruntime_cuda, auto_order=10, is_available=_has_cuda_provider)
)
register_backend(BackendKind("onnxruntime", _open_onnxruntime, auto_order=20))
for _flavor in ("tensorrt", "tensorrt-rtx"):
    register_backend(BackendKind(_flavor, _open_tensorrt, runs=_flavor, auto_order=10))

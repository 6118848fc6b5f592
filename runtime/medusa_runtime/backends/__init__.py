"""Backends: what runs a bundle's graph. Each module imports its own library, and only when it is opened."""

from __future__ import annotations

import warnings

from medusa_runtime.backends.base import Backend, BatchBackend
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import CompiledEngine, is_engine
from medusa_runtime.errors import BackendError

ENGINES = ("tensorrt", "tensorrt-rtx")
NAMES = ("auto", "onnxruntime", "onnxruntime-cuda", *ENGINES)


def open_backend(
    name: str, bundle: Bundle, *, rows: int = 1, threads: int | None = None, check_digests: bool = True
) -> Backend:
    """Opens a bundle, or a compiled engine, with a backend by name.

    ``auto`` is the TensorRT of a compiled engine. For a bundle it is ONNX Runtime on a GPU where that has one, and on
    the CPU otherwise, with a ``RuntimeWarning`` if a GPU was there but could not be used.

    Raises:
        BackendError: The name is unknown or doesn't go with the folder, the library is not installed, or it can't load
            the graph.
        BundleError: A compiled engine is not as its description says.
    """
    if name not in NAMES:
        raise BackendError(f"There is no backend {name!r}: choose one of {', '.join(NAMES)}.")
    if is_engine(bundle.folder):
        return _open_engine(name, bundle, rows, check_digests)
    if name in ENGINES:
        raise BackendError(
            f"{bundle.folder} is a bundle, which {name} can't run as it is: compile it with 'medusa-export trt' and "
            "load the folder that this writes."
        )
    from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend, import_onnxruntime
    from medusa_runtime.backends.onnxruntime.cuda import OnnxRuntimeCudaBackend

    if name == "onnxruntime-cuda":
        return OnnxRuntimeCudaBackend(bundle, rows=rows, threads=threads)
    if name == "auto" and OnnxRuntimeCudaBackend.provider in import_onnxruntime().get_available_providers():
        try:
            return OnnxRuntimeCudaBackend(bundle, rows=rows, threads=threads)
        except BackendError as error:
            warnings.warn(f"Running on the CPU instead of a GPU. {error}", RuntimeWarning, stacklevel=2)
    return OnnxRuntimeBackend(bundle, rows=rows, threads=threads)


def _open_engine(name: str, bundle: Bundle, rows: int, check_digests: bool) -> Backend:
    from medusa_runtime.backends.tensorrt.backend import TensorRTBackend

    description = CompiledEngine.load(bundle.folder, check_digests=check_digests)
    if name not in ("auto", description.flavor):
        raise BackendError(
            f"{bundle.folder} holds an engine of {description.flavor}, which {name} can't run: use backend "
            f"{description.flavor!r} or 'auto', or load the bundle that it was built from."
        )
    return TensorRTBackend(bundle, description, rows=rows)


def open_batch_backend(name: str, bundle: Bundle, *, rows: int, threads: int | None = None) -> BatchBackend:
    """Opens a bundle with a backend that runs some of its rows while others wait, as a service needs it.

    Raises:
        BackendError: The backend can't do that, is not installed, or can't load the graph.
    """
    if name not in ("auto", "onnxruntime") or is_engine(bundle.folder):
        raise BackendError(
            "A service runs a bundle on backend 'onnxruntime' only: load the bundle with that, or use MedusaEngine."
        )
    from medusa_runtime.backends.onnxruntime.batch import OnnxRuntimeBatchBackend

    return OnnxRuntimeBatchBackend(bundle, rows=rows, threads=threads)

"""Backends: what runs a bundle's graph. Each module imports its own library, and only when it is opened."""

from __future__ import annotations

from medusa_runtime.backends.base import BatchBackend
from medusa_runtime.bundle import Bundle
from medusa_runtime.errors import BackendError

NAMES = ("auto", "onnxruntime")


def open_backend(name: str, bundle: Bundle, *, rows: int = 1, threads: int | None = None) -> BatchBackend:
    """Opens a bundle with a backend by name.

    Raises:
        BackendError: The name is unknown, the library is not installed, or it can't load the graph.
    """
    if name not in NAMES:
        raise BackendError(f"There is no backend {name!r}: choose one of {', '.join(NAMES)}.")
    from medusa_runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, rows=rows, threads=threads)

"""MEDUSA decoding over a compiled bundle, with neither torch nor transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medusa_runtime.bundles.bundle import Bundle
    from medusa_runtime.bundles.tree import Tree
    from medusa_runtime.constraints.grammar import Grammar
    from medusa_runtime.constraints.options import Constraints
    from medusa_runtime.engine import MedusaEngine
    from medusa_runtime.errors import (
        BackendError,
        BundleError,
        CallbackError,
        ContextLengthError,
        DeadlineError,
        DeviceLostError,
        DoubtfulRowsError,
        ForkError,
        MedusaError,
        NotFiniteError,
        OutOfDeviceMemoryError,
        QueueFullError,
        RequestCancelledError,
        RequestError,
        ServiceClosedError,
        TreeError,
    )
    from medusa_runtime.generation_stream import GenerationStream
    from medusa_runtime.handle import RequestHandle
    from medusa_runtime.metrics import Metrics, PrometheusMetrics
    from medusa_runtime.request import (
        Chunk,
        EngineOptions,
        GenerationOptions,
        GenerationResult,
        RankedToken,
        RequestOptions,
        Stats,
    )
    from medusa_runtime.sampling import SamplingParams
    from medusa_runtime.service import MedusaService
    from medusa_runtime.session import ChatSession

__version__ = "0.1.0"

_MODULES = {
    "BackendError": "errors",
    "Bundle": "bundles.bundle",
    "BundleError": "errors",
    "CallbackError": "errors",
    "ChatSession": "session",
    "Constraints": "constraints.options",
    "Chunk": "request",
    "ContextLengthError": "errors",
    "DeadlineError": "errors",
    "DeviceLostError": "errors",
    "DoubtfulRowsError": "errors",
    "EngineOptions": "request",
    "ForkError": "errors",
    "GenerationOptions": "request",
    "GenerationResult": "request",
    "GenerationStream": "generation_stream",
    "Grammar": "constraints.grammar",
    "MedusaEngine": "engine",
    "MedusaError": "errors",
    "MedusaService": "service",
    "Metrics": "metrics",
    "NotFiniteError": "errors",
    "OutOfDeviceMemoryError": "errors",
    "PrometheusMetrics": "metrics",
    "QueueFullError": "errors",
    "RankedToken": "request",
    "RequestCancelledError": "errors",
    "RequestError": "errors",
    "RequestHandle": "handle",
    "RequestOptions": "request",
    "SamplingParams": "sampling",
    "ServiceClosedError": "errors",
    "Stats": "request",
    "Tree": "bundles.tree",
    "TreeError": "errors",
}

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "CallbackError",
    "ChatSession",
    "Chunk",
    "Constraints",
    "ContextLengthError",
    "DeadlineError",
    "DeviceLostError",
    "DoubtfulRowsError",
    "EngineOptions",
    "ForkError",
    "GenerationOptions",
    "GenerationResult",
    "GenerationStream",
    "Grammar",
    "MedusaEngine",
    "MedusaError",
    "MedusaService",
    "Metrics",
    "NotFiniteError",
    "OutOfDeviceMemoryError",
    "PrometheusMetrics",
    "QueueFullError",
    "RankedToken",
    "RequestCancelledError",
    "RequestError",
    "RequestHandle",
    "RequestOptions",
    "SamplingParams",
    "ServiceClosedError",
    "Stats",
    "Tree",
    "TreeError",
]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that a command's ``--help`` waits for neither numpy nor tokenizers."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

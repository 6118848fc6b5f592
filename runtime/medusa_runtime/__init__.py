"""MEDUSA decoding over a compiled bundle, with neither torch nor transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medusa_runtime.bundle import Bundle
    from medusa_runtime.engine import GenerationStream, MedusaEngine
    from medusa_runtime.errors import BackendError, BundleError, MedusaError, RequestError, TreeError
    from medusa_runtime.request import Chunk, GenerationResult, Stats
    from medusa_runtime.tree import Tree

__version__ = "0.1.0"

_MODULES = {
    "BackendError": "errors",
    "Bundle": "bundle",
    "BundleError": "errors",
    "Chunk": "request",
    "GenerationResult": "request",
    "GenerationStream": "engine",
    "MedusaEngine": "engine",
    "MedusaError": "errors",
    "RequestError": "errors",
    "Stats": "request",
    "Tree": "tree",
    "TreeError": "errors",
}

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "Chunk",
    "GenerationResult",
    "GenerationStream",
    "MedusaEngine",
    "MedusaError",
    "RequestError",
    "Stats",
    "Tree",
    "TreeError",
]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that a command's ``--help`` waits for neither numpy nor tokenizers."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

"""Import the libraries that dequantize their own weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from medusa_export.common.errors import MissingExtraError


def library(name: str, module: str | None = None) -> Any:
    """Imports a library of the extra ``quantized``.

    Args:
        name: The library.
        module: A module of it, with its full name; the library itself if None.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        package = import_module(name)
        return package if module is None else import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != name:
            raise
        raise MissingExtraError(name, "quantized") from error

"""The two TensorRT libraries, which share one Python API.

``tensorrt`` builds for the GPU at hand; ``tensorrt_rtx`` also builds ahead of time, on a machine without a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from medusa_runtime.errors import BackendError

AUTO = "auto"
# The module of each flavor. The extras of this package are named after the flavors.
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class TensorRTLibrary:
    """An imported TensorRT library.

    Attributes:
        flavor: The library's name in ``MODULES``.
        trt: The module.
    """

    flavor: str
    trt: Any

    @property
    def version(self) -> str:
        """The library's version, such as 1.7.1.116."""
        version: str = self.trt.__version__
        return version


def installed_flavors() -> list[str]:
    """The flavors that are installed here."""
    return [flavor for flavor, module in MODULES.items() if find_spec(module) is not None]


def import_tensorrt(flavor: str = AUTO) -> TensorRTLibrary:
    """Imports a TensorRT library.

    Args:
        flavor: Its name; ``auto`` stands for the one that is installed.

    Raises:
        BackendError: The flavor is unknown, not installed or broken, or several are installed and it is ``auto``.
    """
    if flavor == AUTO:
        flavor = _the_only_flavor()
    if flavor not in MODULES:
        raise BackendError(f"There is no TensorRT flavor {flavor!r}: choose one of {', '.join([AUTO, *MODULES])}.")
    try:
        return TensorRTLibrary(flavor, import_module(MODULES[flavor]))
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{flavor} is not installed. Install it with: pip install 'medusa-export[{flavor}]'"
        ) from error
    except (ImportError, OSError) as error:  # its libraries don't load
        raise BackendError(f"{flavor} is installed but can't be loaded: {error}. Install it again.") from error


def _the_only_flavor() -> str:
    found = installed_flavors()
    if not found:
        raise BackendError(
            "TensorRT is not installed. Install a flavor of it with: pip install 'medusa-export[tensorrt-rtx]' "
            "(builds ahead of time, for RTX GPUs) or 'medusa-export[tensorrt]' (for the GPU at hand)."
        )
    if len(found) > 1:
        raise BackendError(f"{' and '.join(found)} are both installed: choose one with `flavor`.")
    return found[0]


def error_log(trt: Any, *, ignore: str | None = None) -> Any:
    """Makes a logger for TensorRT that prints nothing and keeps errors in its attribute ``errors``.

    Args:
        trt: The TensorRT module, whose logger class it derives from.
        ignore: A regular expression; messages that match it are not kept.
    """

    class ErrorLog(trt.ILogger):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            serious = severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            if serious and (ignore is None or not re.search(ignore, text)):
                self.errors.append(text)

    return ErrorLog()

"""The versions of TensorRT and of the driver that a build needs: checked before it, because a build takes minutes."""

from __future__ import annotations

import re
from importlib.metadata import distributions

from medusa_export.common.errors import EngineBuildError
from medusa_export.common.progress import OnProgress, Progress
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary

# The first and the last version of each flavor whose API was compared with the code.
TRIED = {"tensorrt": ((10, 15), (11, 4)), "tensorrt-rtx": ((1, 4), (1, 7))}


def check_version(library: TensorRTLibrary, on_progress: OnProgress) -> None:
    """Refuses a TensorRT that is too old, and says so if it is newer than all that were tried.

    Args:
        library: The TensorRT to build with.
        on_progress: Receives the note about a newer version.

    Raises:
        EngineBuildError: The version is older than the first that has what a build needs.
    """
    first, last = TRIED[library.flavor]
    found = tuple(int(part) for part in re.findall(r"\d+", library.version)[:2])
    if found < first:
        raise EngineBuildError(
            f"{library.flavor} {library.version} is too old: a build needs {_written(first)} or later.",
            remedy=f"Update it: pip install --upgrade 'medusa-export[{library.flavor}]'.",
        )
    if found > last:
        on_progress(
            Progress(f"{library.flavor} {library.version} is newer than {_written(last)}, the last that was tried")
        )


def check_driver(library: TensorRTLibrary) -> None:
    """Refuses a driver that is older than the CUDA that TensorRT was made for.

    Call it for builds on this machine's GPU. Builds for named architectures need no driver.

    Args:
        library: The TensorRT to build with.

    Raises:
        BackendError: There is no GPU that CUDA can use.
        EngineBuildError: The driver is too old.
    """
    needed = cuda_of(library.flavor)
    if needed is None:
        return
    driver = int(Cuda.open().call("asking for the driver's version", "cudaDriverGetVersion"))
    if driver // 1000 < needed:
        raise EngineBuildError(
            f"{library.flavor} {library.version} is made for CUDA {needed}, but the driver here is for CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}.",
            remedy=f"Update the NVIDIA driver, or install {library.flavor} for CUDA {driver // 1000}.",
        )


def cuda_of(flavor: str) -> int | None:
    """The major version of CUDA that an installed flavor is made for; None if its packages don't say it."""
    pattern = re.compile(rf"{flavor}-cu(\d+)-bindings")
    names = (re.sub(r"[-_.]+", "-", one.metadata["Name"] or "").lower() for one in distributions())
    found = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
    return found[0] if len(found) == 1 else None


def _written(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))

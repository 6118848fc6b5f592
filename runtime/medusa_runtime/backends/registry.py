"""Backends by name: those of this package, and those that other packages register.

Another package registers a backend with an entry point of the group ``medusa_runtime.backends``, which names a
``BackendKind``. Entry points are loaded when their backend is asked for by name, or when ``auto`` has to choose.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from itertools import pairwise

from medusa_runtime.backends.base import Backend
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import CompiledEngine, is_engine
from medusa_runtime.errors import BackendError

AUTO = "auto"
BUNDLE = "bundle"
GROUP = "medusa_runtime.backends"


@dataclass(frozen=True)
class OpenOptions:
    """Options that a backend is opened with, besides the bundle.

    Attributes:
        rows: Sequences that it has to hold side by side.
        threads: CPU threads of one step; all that this process may use if None.
        engine: The description of the compiled engine; None where the folder is a bundle.
        device: Number of the GPU to run on, among those that CUDA sees.
        gpu_memory: Memory of this GPU that may be used, in bytes, or as a fraction up to 1; None for all. Rows that
            don't fit are left out.
    """

    rows: int = 1
    threads: int | None = None
    engine: CompiledEngine | None = None
    device: int = 0
    gpu_memory: float | None = None


@dataclass(frozen=True)
class BackendKind:
    """A backend that can be opened by name.

    Attributes:
        name: Its name.
        open: Opens the backend; raises ``BackendError`` if it can't run here. The function imports its library itself,
            so that a kind can be registered where the library is not installed.
        runs: The folders that it runs: ``bundle``, or the flavor of a compiled engine.
        auto_order: Its place among the backends that ``auto`` tries; lower ones come first. None if ``auto`` never
            takes it.
        is_available: Returns at once whether ``auto`` should try it on this machine.
    """

    name: str
    open: Callable[[Bundle, OpenOptions], Backend]
    runs: str = BUNDLE
    auto_order: int | None = None
    is_available: Callable[[], bool] = lambda: True


_registered: dict[str, BackendKind] = {}


def register_backend(kind: BackendKind) -> None:
    """Makes a backend known by its name.

    Raises:
        BackendError: The name is taken.
    """
    if kind.name == AUTO or kind.name in _registered:
        raise BackendError(f"There is a backend {kind.name!r} already: register yours by another name.")
    _registered[kind.name] = kind


def unregister_backend(name: str) -> None:
    """Forgets a backend that ``register_backend`` made known; nothing happens if there is none."""
    _registered.pop(name, None)


def backend_names() -> list[str]:
    """The names that ``open_backend`` takes, ``auto`` first."""
    return [AUTO, *sorted({*_registered, *_entry_points()})]


def open_backend(
    name: str,
    bundle: Bundle,
    *,
    rows: int = 1,
    threads: int | None = None,
    check_digests: bool = True,
    device: int = 0,
    gpu_memory: float | None = None,
) -> Backend:
    """Opens a bundle or a compiled engine with a backend.

    ``auto`` tries the backends that run the folder, in their order: for a bundle ONNX Runtime on a GPU, if it has one,
    then on the CPU. Where one fails, a ``RuntimeWarning`` says why, and the next one is tried.

    Args:
        name: One of ``backend_names()``.
        bundle: The bundle, or the bundle in the folder of a compiled engine.
        rows: Sequences that the backend has to hold side by side.
        threads: CPU threads of one step; all that this process may use if None.
        check_digests: Compare the files of a compiled engine with their digests.
        device: Number of the GPU to run on. Several GPUs are used by a process, or a service, for each.
        gpu_memory: Memory of the GPU that a compiled engine may use, in bytes, or as a fraction up to 1; None for all.
            The backend holds fewer rows if not all fit.

    Raises:
        RequestError: ``gpu_memory`` is not a number above 0.
        BackendError: The name is unknown, the backend doesn't run this folder, its library is not installed, or it
            can't load the graph.
        BundleError: A compiled engine is not as its description says.
    """
    if name not in _registered and name not in backend_names():
        raise BackendError(f"There is no backend {name!r}: choose one of {', '.join(backend_names())}.")
    kind = None if name == AUTO else _kind(name)
    engine = CompiledEngine.load(bundle.folder, check_digests=check_digests) if is_engine(bundle.folder) else None
    options = OpenOptions(rows, threads, engine, device, gpu_memory)
    if kind is None:
        return _open_best(bundle, options)
    if kind.runs != _content(options):
        raise BackendError(_mismatch(kind, bundle, options))
    return kind.open(bundle, options)


def _open_best(bundle: Bundle, options: OpenOptions) -> Backend:
    """Opens the first backend that can be opened."""
    content = _content(options)
    kinds = [kind for kind in _all_kinds() if kind.runs == content and kind.auto_order is not None]
    kinds = [kind for kind in sorted(kinds, key=lambda kind: kind.auto_order or 0) if kind.is_available()]
    if not kinds:
        raise BackendError(
            f"No backend runs {bundle.folder}, which holds {_words(content)}: choose one of "
            f"{', '.join(backend_names()[1:])}."
        )
    for kind, following in pairwise(kinds):
        try:
            return kind.open(bundle, options)
        except BackendError as error:
            warnings.warn(f"Running on {following.name} instead of {kind.name}. {error}", RuntimeWarning, stacklevel=3)
    return kinds[-1].open(bundle, options)


def _content(options: OpenOptions) -> str:
    """The content of a folder, as a word of ``BackendKind.runs``."""
    return BUNDLE if options.engine is None else options.engine.flavor


def _words(content: str) -> str:
    return "a bundle" if content == BUNDLE else f"an engine of {content}"


def _mismatch(kind: BackendKind, bundle: Bundle, options: OpenOptions) -> str:
    content = _content(options)
    held = f"{bundle.folder} holds {_words(content)}, which {kind.name} can't run"
    if content == BUNDLE:
        return f"{held}: compile it with 'medusa-export trt' and load the folder that this writes."
    fitting = [other.name for other in _all_kinds() if other.runs == content]
    names = ", ".join(map(repr, [*fitting, AUTO]))
    return f"{held}: use backend {names}, or load the bundle that it was built from."


def _kind(name: str) -> BackendKind:
    """A backend by name, imported if it comes from an entry point."""
    return _registered[name] if name in _registered else _loaded(_entry_points()[name])


def _all_kinds() -> Iterator[BackendKind]:
    """All backends; a warning names those that can't be imported."""
    yield from _registered.values()
    for name, point in _entry_points().items():
        if name not in _registered:
            try:
                yield _loaded(point)
            except BackendError as error:
                warnings.warn(str(error), RuntimeWarning, stacklevel=4)


def _loaded(point: EntryPoint) -> BackendKind:
    try:
        kind = point.load()
    except Exception as error:  # another package's import may raise anything
        raise BackendError(f"Backend {point.name!r} can't be imported from {point.value}: {error!r}.") from error
    if not isinstance(kind, BackendKind) or kind.name != point.name:
        raise BackendError(
            f"The entry point {point.name!r} of group {GROUP} gives {kind!r}: expected a BackendKind of that name."
        )
    return kind


def _entry_points() -> dict[str, EntryPoint]:
    """Entry points of installed packages by name."""
    return {point.name: point for point in entry_points(group=GROUP)}

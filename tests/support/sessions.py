"""Sessions of ONNX Runtime that tests of a process share: to open one takes longer than many a test."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from medusa_runtime.backends.onnxruntime import session, session_backend
from medusa_runtime.bundles.bundle import DESCRIPTION, WEIGHTS, Bundle

MOST_KEPT = 24
_kept: dict[Hashable, Any] = {}  # the one that was used last comes last


def shared(key: Hashable, opened: Callable[[], Any]) -> Any:
    """The session of a key, opened if it is not kept. A session keeps no state, and any thread may run it."""
    found = _kept.pop(key, None) or opened()
    _kept[key] = found
    if len(_kept) > MOST_KEPT:
        del _kept[next(iter(_kept))]
    return found


def version_of(file: Path) -> Hashable:
    """A key that changes whenever a file is written; None if there is no file."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return str(file), facts.st_ino, facts.st_size, facts.st_mtime_ns


def share_sessions() -> None:
    """Makes backends take shared sessions: one for each graph, with its weights, provider and number of threads."""
    original = session_backend.open_session

    def open_session(bundle: Bundle, graph: Path | bytes, *, threads: int, provider: str) -> Any:
        content = hashlib.sha256(graph).digest() if isinstance(graph, bytes) else version_of(graph)
        files = tuple(version_of(bundle.folder / name) for name in (DESCRIPTION, WEIGHTS))
        library = session.import_onnxruntime()  # a test, or a profile, may put other classes in place of these
        key = (library.InferenceSession, library.SessionOptions, content, files, threads, provider)
        return shared(key, lambda: original(bundle, graph, threads=threads, provider=provider))

    session_backend.open_session = open_session

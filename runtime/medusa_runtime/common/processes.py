"""Rules for native code when a process forks and when it ends.

1. An object belongs to the process that made it. ``fork`` does not copy threads to the child, so a call in the child
   that waits for a thread would wait for ever. ``ProcessBound`` raises an error instead.
2. A child doesn't destroy inherited objects either: ONNX Runtime's destructors would wait for threads, too.
   ``keep_in_children`` keeps such objects alive.
3. The interpreter doesn't end while a thread is in native code. A thread that returned to an interpreter that has
   ended would abort the process. ``native_work`` makes the end of the process wait; ``close_at_exit`` closes open
   engines and services.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medusa_runtime.errors import ForkError, MedusaError

if TYPE_CHECKING:
    from medusa_runtime.common.closeable import Closeable

_log = logging.getLogger(__name__)


class ProcessBound:
    """Base of objects that only the process that made them can use."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def in_forked_child(self) -> bool:
        """True in a child that ``fork`` made of the process that the object belongs to."""
        return os.getpid() != self._process

    @property
    def fork_error(self) -> ForkError:
        """The error to raise in a forked child."""
        return ForkError(
            f"This {type(self).__name__} belongs to process {self._process} and can't be used in process "
            f"{os.getpid()}, a fork of it: threads don't survive a fork. Load the bundle in the child, or start "
            "children with multiprocessing's 'spawn' (with gunicorn: without --preload)."
        )

    def check_process(self) -> None:
        """Raises ``ForkError`` in a forked child. Takes no lock: the fork may have copied a lock that is held."""
        if self.in_forked_child:
            raise self.fork_error


class _NativeWork:
    """Counts the threads that are in native code."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = 0
        self.is_exiting = False


_work = _NativeWork()
_open: weakref.WeakSet[Closeable] = weakref.WeakSet()
_kept: weakref.WeakSet[Any] = weakref.WeakSet()


@contextmanager
def native_work() -> Iterator[None]:
    """A context manager: the process does not end before the block is left.

    Raises:
        MedusaError: The process is about to end.
    """
    work = _work
    with work.changed:
        if work.is_exiting:
            raise MedusaError("This Python process is about to end: it can't start more work.")
        work.count += 1
    try:
        yield
    finally:
        with work.changed:
            work.count -= 1
            work.changed.notify_all()


def close_at_exit(item: Closeable) -> None:
    """Registers an object to be closed when this process ends. Holds no reference to it."""
    _open.add(item)


def keep_in_children(item: object) -> None:
    """Registers an object that children made by ``fork`` never destroy. Holds no reference to it in this process."""
    _kept.add(item)


@atexit.register
def _close_all() -> None:
    """Waits for native work and closes all registered objects. Runs while threads can still end by themselves."""
    with _work.changed:
        _work.is_exiting = True
        _work.changed.wait_for(lambda: not _work.count)
    for item in list(_open):
        if not item.in_forked_child:
            try:
                item.close()
            except Exception:  # noqa: BLE001  # the other objects must be closed as well
                _log.exception("A %s could not be closed at exit", type(item).__name__)


def _after_fork() -> None:
    global _work  # noqa: PLW0603  # replaced, since a lock that another thread held at the fork stays held
    _work = _NativeWork()
    for item in list(_kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

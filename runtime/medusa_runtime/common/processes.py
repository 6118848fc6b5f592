"""What a process may do with native code when it forks and when it ends.

1. An object belongs to the process that made it. A child made by ``fork`` has no copy of its threads, so that whatever
   waits for one of them would wait for ever. ``Resident`` refuses instead.
2. A child doesn't destroy what it inherited either: ONNX Runtime would wait there for its threads, too.
   ``keep_in_children`` keeps such objects alive.
3. The interpreter doesn't end in the middle of native code. A thread that comes back from it to an interpreter that is
   gone aborts the process. ``native_work`` makes the end wait, and ``close_at_exit`` closes what is open.
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
    from medusa_runtime.common.closing import Closing

_log = logging.getLogger(__name__)


class Resident:
    """Base of what only the process that made it can use."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_abroad(self) -> bool:
        """Whether this is a child that ``fork`` made of the process that the object belongs to."""
        return os.getpid() != self._process

    @property
    def fork_error(self) -> ForkError:
        """What to raise where it is abroad."""
        return ForkError(
            f"This {type(self).__name__} belongs to process {self._process} and can't be used in process "
            f"{os.getpid()}, which fork made of it: threads don't survive a fork. Load the bundle in the child, or "
            "start children with multiprocessing's 'spawn' (with gunicorn: without --preload)."
        )

    def check_process(self) -> None:
        """Raises ``ForkError`` where it is abroad; takes no lock, as a fork may have copied one that is held."""
        if self.is_abroad:
            raise self.fork_error


class _NativeWork:
    """Counts the threads that are in native code."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = 0
        self.is_exiting = False


_work = _NativeWork()
_open: weakref.WeakSet[Closing] = weakref.WeakSet()
_kept: weakref.WeakSet[Any] = weakref.WeakSet()


@contextmanager
def native_work() -> Iterator[None]:
    """Makes the end of the process wait until the block has been left.

    Raises:
        MedusaError: The process is about to end.
    """
    work = _work
    with work.changed:
        if work.is_exiting:
            raise MedusaError("This Python process is about to end: it takes no more work.")
        work.count += 1
    try:
        yield
    finally:
        with work.changed:
            work.count -= 1
            work.changed.notify_all()


def close_at_exit(item: Closing) -> None:
    """Closes something at the end of this process, unless it is gone by then; holds no reference to it."""
    _open.add(item)


def keep_in_children(item: object) -> None:
    """Never destroys something in a child made by ``fork``; holds no reference to it in this process."""
    _kept.add(item)


@atexit.register
def _close_all() -> None:
    """Waits for native work and closes what this process has opened, as long as threads can still come to an end."""
    with _work.changed:
        _work.is_exiting = True
        _work.changed.wait_for(lambda: not _work.count)
    for item in list(_open):
        if not item.is_abroad:
            try:
                item.close()
            except Exception:  # noqa: BLE001  # the others are to be closed as well
                _log.exception("A %s could not be closed at exit", type(item).__name__)


def _after_fork() -> None:
    global _work  # noqa: PLW0603  # a lock that another thread held at the fork stays held
    _work = _NativeWork()
    for item in list(_kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

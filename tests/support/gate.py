"""A backend for a service whose steps a test can delay, or make fail."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from medusa_runtime import Bundle
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend


class AnyGate:
    """A backend whose steps wait for ``open``, and call ``fail`` first, which may raise.

    Args:
        inner: The real backend.

    Attributes:
        inner: The real backend.
        open: Steps wait for this event.
        entered: Released once by each step.
        fail: Called before each step, with size, prompts and rows.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.fail = lambda size, prompts, rows: None

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def step(self, size: int, prompts: object = None, rows: Sequence[int] | None = None) -> object:
        self.entered.release()
        assert self.open.wait(30)
        self.check_room(size, rows)
        self.fail(size, prompts, rows)
        return self.inner.step(size, prompts, rows)

    def check_room(self, size: int, rows: Sequence[int] | None) -> None:
        """Checks that a step writes nothing behind the end of the caches; the real backend does it itself."""

    @property
    def is_closed(self) -> bool:
        """True once the backend has given its memory back."""
        return self.inner._loaded is None


class Gate(AnyGate):
    """A gate over the backend on the CPU, which moves rows.

    Args:
        bundle: The bundle.
        rows: Rows of the backend.

    Attributes:
        fail_arrange: Called before each ``arrange``, with its arguments.
    """

    def __init__(self, bundle: Bundle, rows: int) -> None:
        super().__init__(OnnxRuntimeBackend(bundle, rows=rows, threads=1))
        self.fail_arrange = lambda rows, capacity: None

    def check_room(self, size: int, rows: Sequence[int] | None) -> None:
        window = self.inner._store.window(rows)
        assert window is not None
        assert 3 + int(self.inner.lengths[rows].max()) + size <= window.block.capacity

    def arrange(self, rows: Sequence[int], capacity: int) -> int:
        self.fail_arrange(rows, capacity)
        return self.inner.arrange(rows, capacity)

    @property
    def is_closed(self) -> bool:
        return self.inner.capacity == 0

"""A backend for a service whose steps a test can delay, or make fail."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from medusa_runtime import Bundle
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend


class Gate:
    """A backend whose steps wait for ``open``, and call ``fail`` first, which may raise.

    Attributes:
        inner: The real backend.
        open: Steps wait for this event.
        entered: Released once by each step.
        fail: Called before each step, with size, prompts and rows.
        fail_arrange: Called before each ``arrange``, with its arguments.
    """

    def __init__(self, bundle: Bundle, rows: int) -> None:
        self.inner = OnnxRuntimeBackend(bundle, rows=rows, threads=1)
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.fail = lambda size, prompts, rows: None
        self.fail_arrange = lambda rows, capacity: None

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def step(self, size: int, prompts: object = None, rows: Sequence[int] | None = None) -> object:
        self.entered.release()
        assert self.open.wait(30)
        window = self.inner._store.window(rows)
        assert window is not None
        assert 3 + int(self.inner.lengths[rows].max()) + size <= window.block.capacity  # none writes beyond it
        self.fail(size, prompts, rows)
        return self.inner.step(size, prompts, rows)

    def arrange(self, rows: Sequence[int], capacity: int) -> int:
        self.fail_arrange(rows, capacity)
        return self.inner.arrange(rows, capacity)

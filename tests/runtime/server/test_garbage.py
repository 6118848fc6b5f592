"""Requests leave nothing that only a garbage collection frees: collections hold up the event loop."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from medusa_runtime.server.app import make_app
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings
from runtime.server.conftest import Served

pytestmark = pytest.mark.slow

HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
LONG = HI | {"max_tokens": 400, "ignore_eos": True}
# Bodies, the statuses of their answers, and whether the client leaves.
REQUESTS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "whole": (HI, 200, False),
    "stream": (HI | {"stream": True}, 200, False),
    "left": (LONG, 499, True),
    "left stream": (LONG | {"stream": True}, 200, True),
    "refused body": ({"messages": 5}, 400, False),
    "refused request": (HI | {"temperature": -1}, 400, False),
}


@contextmanager
def garbage() -> Iterator[list[object]]:
    """A context manager that gives objects of this project which only a garbage collection would free."""
    found: list[object] = []
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += [item for item in gc.garbage if "medusa_runtime" in _origin(item)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def _origin(item: object) -> str:
    """The file of a frame, or the module of an object's type, which some libraries set to None."""
    return item.f_code.co_filename if isinstance(item, FrameType) else str(type(item).__module__)


@pytest.mark.parametrize("kind", REQUESTS)
def test_requests_leave_no_garbage(served: Served, kind: str) -> None:
    body, expected, leaves = REQUESTS[kind]
    app = make_app(served.service, ServerMetrics("tiny"), Settings(bundle=Path("tiny")))

    async def ask() -> int:
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        statuses: list[int] = []

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.sleep(0.1 if leaves else 60)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            statuses.append(message.get("status"))

        path = "/v1/chat/completions"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        await app({**scope, "headers": [], "client": ("1.2.3.4", 5)}, receive, send)
        return statuses[0]

    async def ask_again() -> list[object]:
        assert await ask() == expected  # what is made once is made now
        with garbage() as found:
            assert await ask() == expected
            while served.service.load_figures != (0, 0):
                await asyncio.sleep(0.01)
        return found

    assert asyncio.run(ask_again()) == []

"""Streams of events: what is sent in one message, and what a lost client ends."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncGenerator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from medusa_runtime import BackendError
from medusa_runtime.server import run
from medusa_runtime.server.settings import Settings
from medusa_runtime.server.streaming import DONE, KEEP_ALIVE, Events, EventStream, event

Message = dict[str, Any]


def messages_of(events: AsyncGenerator[Events], ended: list[bool], *, left: bool = False, named: bool = False) -> Any:
    """The messages of a stream. The client has left at the second message if ``left`` is True."""
    sent: list[Message] = []

    async def answer() -> None:
        leaves = asyncio.Event()

        async def receive() -> Message:
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(dict(message))
            if left and len(sent) == 2:
                leaves.set()

        await EventStream(events, lambda: ended.append(True), named=named)({"type": "http"}, receive, send)

    asyncio.run(answer())
    return sent


def test_events_that_come_together_are_sent_together() -> None:
    """A connection that is lost fails one write, and not ten before the event loop sees it."""

    async def events() -> AsyncGenerator[Events]:
        yield [{"number": number} for number in range(10)]
        yield []
        yield [{"number": 10}]

    ended: list[bool] = []
    start, *bodies = messages_of(events(), ended)
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    assert (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]
    assert [(body["body"].decode(), body["more_body"]) for body in bodies] == [
        ("".join(event({"number": number}) for number in range(10)), True),
        (KEEP_ALIVE, True),
        (event({"number": 10}), True),
        (DONE, False),
    ]
    assert ended == [True]


def test_an_error_is_the_last_event() -> None:
    async def events() -> AsyncGenerator[Events]:
        yield [{"type": "begun"}]
        raise BackendError("lost")

    *_, last = messages_of(events(), [], named=True)
    name, data, *_ = last["body"].decode().splitlines()
    assert name == "event: error" and json.loads(data.removeprefix("data: "))["type"] == "error"
    assert not last["more_body"]


def test_a_client_that_leaves_ends_the_events() -> None:
    closed: list[bool] = []

    async def events() -> AsyncGenerator[Events]:
        try:
            yield [{"number": 0}]
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    ended: list[bool] = []
    assert len(messages_of(events(), ended, left=True)) == 2
    assert (closed, ended) == ([True], [True])


def test_the_server_runs_in_the_fast_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    uvloop = pytest.importorskip("uvloop")
    loops: list[asyncio.AbstractEventLoop] = []

    async def app(scope: Message, receive: Any, send: Any) -> None:
        loops.append(asyncio.get_running_loop())
        await send({"type": "lifespan.startup.failed", "message": "The test needs no more."})

    monkeypatch.setattr(run, "make_app", lambda *_: app)
    monkeypatch.setattr(Settings, "load_service", lambda *_: nullcontext())
    monkeypatch.setattr(run.sys, "setswitchinterval", lambda _: None)
    try:
        with pytest.raises(SystemExit):
            run.serve(Settings(bundle=Path("tiny")), host="127.0.0.1", port=0)
    finally:
        gc.unfreeze()
    assert isinstance(loops[0], uvloop.Loop)


def test_names_are_found_out_once() -> None:
    """Each chunk asks for them, and the folder's name takes several looks at the file system."""
    settings = Settings(bundle=Path("tiny"))
    assert settings.names == ("tiny",) and settings.names is settings.names

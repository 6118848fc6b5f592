"""Server-sent events: their format, comments that keep a connection alive, and errors that end a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from medusa_runtime.server.errors import api_error

_log = logging.getLogger(__name__)

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"

_ENCODER = json.JSONEncoder(separators=(",", ":"))

T = TypeVar("T")
# The JSON objects of events that come at the same time; empty after a time without events.
Events = Sequence[Mapping[str, object]]


def event(data: Mapping[str, object], *, named: bool = False) -> str:
    """An event in ASCII, as many clients read U+0085, U+2028 and U+2029 as ends of lines.

    Args:
        data: The event's JSON object.
        named: If True, the event has the object's ``type`` as its name.
    """
    name = f"event: {data['type']}\n" if named else ""
    return f"{name}data: {_ENCODER.encode(data)}\n\n"


class EventStream(Response):
    """A response of events. A client that disconnects ends them.

    Events that come at the same time are sent in one message. That is cheaper, and nothing more is written to a
    connection that is lost: the event loop sees the loss before the next message.

    Args:
        events: The events. An error that they raise becomes the last event.
        at_end: Is called at the end, also if the client disconnects before the first event is asked for.
        named: If True, events have their type as a name, and the end has no mark.
    """

    def __init__(self, events: AsyncGenerator[Events], at_end: Callable[[], None], *, named: bool = False) -> None:
        self.status_code = 200
        self.media_type = "text/event-stream"
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events = events
        self._at_end = at_end
        self._named = named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                await unless_disconnected(receive, self._send_events(send))
        finally:
            self._at_end()

    async def _send_events(self, send: Send) -> None:
        """Sends all events, and the mark of the end."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._texts()) as texts:
            async for text, more in texts:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

    async def _texts(self) -> AsyncGenerator[tuple[str, bool]]:
        """The text of each message, with True if more messages follow."""
        last = "" if self._named else DONE
        try:
            async with aclosing(self._events) as batches:
                async for batch in batches:
                    yield "".join(event(data, named=self._named) for data in batch) or KEEP_ALIVE, True
        except Exception as error:  # noqa: BLE001  # the status is sent already, so any error becomes an event
            last = self._error(error) + last
        yield last, False

    def _error(self, error: Exception) -> str:
        """The event of an error."""
        found = api_error(error)
        if found.status == 500:
            _log.error("A stream failed", exc_info=error)
        facts = found.answer["error"]
        return event({**facts, "type": "error"} if self._named else {"error": facts}, named=self._named)


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled if the client disconnects.

    Args:
        receive: Receives the messages of the request, whose body has been read.
        work: The work.

    Raises:
        ClientDisconnect: The client has disconnected.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        watch.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(task, watch, return_exceptions=True)
        del task  # an error's traceback holds this frame, which must not hold the error

"""Server-sent events: their format, comments that keep a connection alive, and errors that end a stream."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from medusa_runtime.server.errors import api_error

_log = logging.getLogger(__name__)

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"

_ENCODER = json.JSONEncoder(separators=(",", ":"))

# The JSON object of an event; None for a comment.
Event = Mapping[str, object] | None


def event(data: Mapping[str, object], *, named: bool = False) -> str:
    """An event in ASCII, as many clients read U+0085, U+2028 and U+2029 as ends of lines.

    Args:
        data: The event's JSON object.
        named: If True, the event has the object's ``type`` as its name.
    """
    name = f"event: {data['type']}\n" if named else ""
    return f"{name}data: {_ENCODER.encode(data)}\n\n"


class EventStream(StreamingResponse):
    """A response of events. A client that disconnects ends them.

    Args:
        events: The events. An error that they raise becomes the last event.
        at_end: Is called at the end, also if the client disconnects before the first event is asked for.
        named: If True, events have their type as a name, and the end has no mark.
    """

    def __init__(self, events: AsyncGenerator[Event], at_end: Callable[[], None], *, named: bool = False) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_texts(events, named=named), media_type="text/event-stream", headers=headers)
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


async def _texts(events: AsyncGenerator[Event], *, named: bool) -> AsyncIterator[str]:
    """The events as text, and the mark of the end."""
    try:
        async with aclosing(events):
            async for data in events:
                yield KEEP_ALIVE if data is None else event(data, named=named)
    except Exception as error:  # noqa: BLE001  # the status is sent already, so any error becomes an event
        found = api_error(error)
        if found.status == 500:
            _log.error("A stream failed", exc_info=error)
        facts = found.answer["error"]
        yield event({"type": "error", **facts} if named else {"error": facts}, named=named)
    if not named:
        yield DONE

"""Server-sent events: their format, comments that keep a connection alive, and errors that end a stream."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing

from starlette.responses import StreamingResponse

from medusa_runtime.server.errors import api_error

_log = logging.getLogger(__name__)

KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"

# The JSON object of an event; None for a comment.
Event = Mapping[str, object] | None


def event(data: Mapping[str, object], *, named: bool = False) -> str:
    """An event in ASCII, as many clients read U+0085, U+2028 and U+2029 as ends of lines.

    Args:
        data: The event's JSON object.
        named: If True, the event has the object's ``type`` as its name.
    """
    name = f"event: {data['type']}\n" if named else ""
    return f"{name}data: {json.dumps(data, separators=(',', ':'))}\n\n"


def event_stream(events: AsyncIterator[Event], at_end: Callable[[], None], *, named: bool = False) -> StreamingResponse:
    """Streams events. A client that disconnects ends them.

    Args:
        events: The events. A ``MedusaError`` that they raise becomes the last event.
        at_end: Is called at the end, whatever ends the stream.
        named: If True, events have their type as a name, and the end has no mark.
    """

    async def texts() -> AsyncIterator[str]:
        try:
            async with aclosing(events):  # type: ignore[type-var]  # the generators that endpoints give have aclose
                async for data in events:
                    yield KEEP_ALIVE if data is None else event(data, named=named)
        except Exception as error:  # noqa: BLE001  # the status is sent already, so any error becomes an event
            found = api_error(error)
            if found.status == 500:
                _log.error("A stream failed", exc_info=error)
            facts = found.answer["error"]
            yield event({"type": "error", **facts} if named else {"error": facts}, named=named)
        finally:
            at_end()
        if not named:
            yield DONE

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(texts(), media_type="text/event-stream", headers=headers)

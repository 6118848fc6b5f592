r"""A web service for a bundle: chat over server-sent events. A client that disconnects cancels its request.

    pip install 'medusa-export[server]'
    MEDUSA_BUNDLE=bundle uvicorn --app-dir examples fastapi_app:app

    curl -N localhost:8000/chat -H 'Content-Type: application/json' \
        -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

Each ``text`` event carries a piece of the answer. The last event is ``end``, with the reason why the answer ended and
usage figures, or ``error``, with the error's type and message.

Settings are environment variables: ``MEDUSA_BUNDLE``, the folder of the bundle; ``MEDUSA_ROWS``, the number of requests
that run at the same time; ``MEDUSA_MAX_QUEUE``, the number of requests that may wait; ``MEDUSA_MAX_BODY``, the maximum
size of a request's body in bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from medusa_runtime import (
    MedusaError,
    MedusaService,
    PrometheusMetrics,
    QueueFullError,
    RequestError,
    RequestHandle,
    SamplingParams,
    ServiceClosedError,
)

DRAIN_SECONDS = 30.0
MAX_BODY = 2**20  # bytes; parsing JSON of this size stops all streams for some milliseconds


class Message(BaseModel):
    """A chat message. Its content is text, or a list of parts such as ``{"type": "text", "text": …}``."""

    model_config = ConfigDict(extra="forbid")
    role: str
    content: str | list[dict[str, Any]]


class ChatRequest(BaseModel):
    """A request for an answer. Unknown fields are refused. Temperature 0 is greedy decoding."""

    model_config = ConfigDict(extra="forbid")
    messages: list[Message] = Field(min_length=1)
    max_new_tokens: int = Field(default=128, ge=1)
    stop: list[str] = []
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    priority: int = 0
    timeout: float | None = Field(default=None, gt=0)


class SettingError(MedusaError):
    """An environment variable that is missing or invalid."""


def setting(name: str, default: int | None = None) -> int:
    """Reads a non-negative integer from an environment variable."""
    value = os.environ.get(name, str(default))
    if not value.isascii() or not value.isdigit():
        raise SettingError(f"{name} is {value!r:.80}: expected a number.")
    return int(value[:18])


class RequestLimits:
    """Refuses bodies that are too large, and replaces the traceback of a failed start by its message."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a connection on, with a bounded body or a short start-up message."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, partial(self.send_start_error, send))
            return
        await self.app(scope, self.bounded(scope, receive) if scope["type"] == "http" else receive, send)

    @staticmethod
    async def send_start_error(send: Send, message: AsgiMessage) -> None:
        """Replaces the traceback of a failed start by the error's message."""
        if message["type"] == "lifespan.startup.failed" and app.state.start_error:
            message = {**message, "message": app.state.start_error}
        await send(message)

    @staticmethod
    def bounded(scope: Scope, receive: Receive) -> Receive:
        """Receives a body up to its limit. The announced length is checked first, then the bytes received."""
        limit, received = setting("MEDUSA_MAX_BODY", MAX_BODY), 0
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")

        async def receive_bounded() -> AsgiMessage:
            nonlocal received
            if announced.isdigit() and int(announced[:18]) > limit:
                raise HTTPException(413, f"The body has more than {limit:,} bytes.", {"Connection": "close"})
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, f"The body has more than {limit:,} bytes.", {"Connection": "close"})
            return message

        return receive_bounded


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Loads the bundle at start. At the end, waits for running requests before it closes the service."""
    app.state.start_error = ""
    try:
        metrics, app.state.registry = PrometheusMetrics.in_own_registry()
        if "MEDUSA_BUNDLE" not in os.environ:
            raise SettingError("MEDUSA_BUNDLE is not set: give the folder of a bundle in it.")
        setting("MEDUSA_MAX_BODY", MAX_BODY)
        app.state.service = service = await run_in_threadpool(
            MedusaService.load,
            os.environ["MEDUSA_BUNDLE"],
            rows=setting("MEDUSA_ROWS", 4),
            max_queue=setting("MEDUSA_MAX_QUEUE", 64),
            metrics=metrics,
        )
    except MedusaError as error:
        app.state.start_error = str(error)
        raise
    try:
        yield
    finally:
        await run_in_threadpool(service.drain, DRAIN_SECONDS)
        await run_in_threadpool(service.close)


app = FastAPI(title="medusa-export", lifespan=lifespan)
app.add_middleware(RequestLimits)


@app.exception_handler(RequestValidationError)
async def refused(_: Request, error: RequestValidationError) -> Response:
    """Describes an invalid body without quoting it: it may hold values that JSON can't encode, such as infinity."""
    found = [{key: part[key] for key in ("type", "loc", "msg")} for part in error.errors()]
    return Response(json.dumps({"detail": found}), 422, media_type="application/json")


@app.post("/chat")
async def chat(body: ChatRequest, request: Request) -> StreamingResponse:
    """Streams an answer."""
    service: MedusaService = request.app.state.service
    try:
        handle = await service.asubmit(
            [message.model_dump() for message in body.messages],
            max_new_tokens=body.max_new_tokens,
            stop=body.stop,
            sampling=SamplingParams(
                temperature=body.temperature, top_k=body.top_k, top_p=body.top_p, min_p=body.min_p, seed=body.seed
            ),
            priority=body.priority,
            timeout=body.timeout,
        )
    except QueueFullError as error:
        raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
    except RequestError as error:
        raise HTTPException(422, str(error)) from error
    except ServiceClosedError as error:
        raise HTTPException(503, str(error)) from error
    return StreamingResponse(events(handle), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def events(handle: RequestHandle) -> AsyncIterator[str]:
    """Yields the answer as server-sent events. A client that disconnects cancels its request."""
    with handle:
        try:
            async for chunk in handle:
                if chunk.text:
                    yield event("text", {"text": chunk.text})
            result = await handle.aresult()
        except MedusaError as error:
            yield event("error", {"type": type(error).__name__, "message": str(error)})
            return
        usage = {
            "prompt_tokens": result.stats.prompt_tokens,
            "cached_tokens": result.stats.cached_tokens,
            "completion_tokens": result.stats.completion_tokens,
            "tokens_per_step": result.stats.tokens_per_step,
        }
        yield event("end", {"finish_reason": result.finish_reason, "usage": usage})


def event(name: str, data: dict[str, Any]) -> str:
    """Formats a server-sent event, in ASCII: many clients read U+0085, U+2028 and U+2029 as ends of lines."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


@app.get("/health")
async def health(request: Request, response: Response) -> dict[str, str | int]:
    """The state of the service, and the numbers of waiting and running requests. 503 unless it takes new ones."""
    service: MedusaService = request.app.state.service
    waiting, running = service.load_figures
    if service.state != "ready":
        response.status_code = 503
    return {"state": service.state, "waiting": waiting, "running": running}


@app.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics in the text format of Prometheus."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)

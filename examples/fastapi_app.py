r"""A web service around a bundle: chat over server-sent events, cancelled when the client leaves.

    pip install 'medusa-export[server]'
    MEDUSA_BUNDLE=bundle uvicorn --app-dir examples fastapi_app:app

    curl -N localhost:8000/chat -H 'Content-Type: application/json' \
        -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

Each event carries the text that has become final; the last one is named ``end`` and says why the answer ended and
what it took, or ``error`` and says what went wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

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


class Message(BaseModel):
    """A chat message."""

    model_config = ConfigDict(extra="forbid")
    role: str
    content: str


class ChatRequest(BaseModel):
    """A request for an answer; what the service doesn't know is refused. Greedy at temperature 0."""

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


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Loads the bundle, and lets running requests end before the process does."""
    metrics, app.state.registry = PrometheusMetrics.in_own_registry()
    app.state.service = service = await run_in_threadpool(
        MedusaService.load,
        os.environ["MEDUSA_BUNDLE"],
        rows=int(os.environ.get("MEDUSA_ROWS", "4")),
        max_queue=int(os.environ.get("MEDUSA_MAX_QUEUE", "64")),
        metrics=metrics,
    )
    try:
        yield
    finally:
        await run_in_threadpool(service.drain, DRAIN_SECONDS)
        await run_in_threadpool(service.close)


app = FastAPI(title="medusa-export", lifespan=lifespan)


@app.exception_handler(RequestValidationError)
async def refused(_: Request, error: RequestValidationError) -> Response:
    """What is wrong with a body, without the body: it may hold what JSON can't, such as numbers beyond all bounds."""
    found = [{key: part[key] for key in ("type", "loc", "msg")} for part in error.errors()]
    return Response(json.dumps({"detail": found}), 422, media_type="application/json")


@app.post("/chat")
async def chat(body: ChatRequest, request: Request) -> StreamingResponse:
    """Streams an answer."""
    service: MedusaService = request.app.state.service
    try:
        handle = service.submit(
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
    """The answer as server-sent events. A client that leaves ends this generator, and with it the request."""
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
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


@app.get("/health")
async def health(request: Request, response: Response) -> dict[str, str | int]:
    """What the service does with new requests, and how many wait and run; 503 if it refuses them."""
    service: MedusaService = request.app.state.service
    waiting, running = service.load_figures
    if service.state != "ready":
        response.status_code = 503
    return {"state": service.state, "waiting": waiting, "running": running}


@app.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)

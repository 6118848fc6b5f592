"""The routes of the server, and the OpenAPI description of their bodies and answers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from medusa_runtime import __version__
from medusa_runtime.server import status
from medusa_runtime.server.api import Api
from medusa_runtime.server.chat import ChatJob
from medusa_runtime.server.completions import CompletionJob
from medusa_runtime.server.errors import ApiError, api_error
from medusa_runtime.server.gate import Gate
from medusa_runtime.server.generation import Generation
from medusa_runtime.server.openapi import describe_bodies
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.responses import ResponseJob
from medusa_runtime.server.schema.answers import (
    ChatCompletion,
    Completion,
    ErrorAnswer,
    Health,
    Model,
    ModelList,
    Tokens,
)
from medusa_runtime.server.schema.chat import ChatRequest
from medusa_runtime.server.schema.completions import CompletionRequest
from medusa_runtime.server.schema.responses import ResponsesRequest
from medusa_runtime.server.schema.tokenize import TokenizeRequest
from medusa_runtime.server.settings import Settings
from medusa_runtime.server.streaming import Events, EventStream, unless_disconnected
from medusa_runtime.server.tokens import tokenized
from medusa_runtime.server.tracing import NoTracing, Tracing
from medusa_runtime.service import MedusaService

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Job(Protocol):
    """A request whose answers are generated."""

    @property
    def generation(self) -> Generation:
        """The answers."""
        ...

    @property
    def stream(self) -> bool:
        """True if the answer comes as events."""
        ...

    async def answer(self) -> Any:
        """The complete answer as a JSON object."""
        ...

    def events(self) -> AsyncGenerator[Events]:
        """The answer as events: those that come at the same time together, and none after a quiet time."""
        ...


def make_app(
    service: MedusaService, metrics: ServerMetrics, settings: Settings, tracing: Tracing | None = None
) -> ASGIApp:
    """The server's application.

    Args:
        service: The service that answers. It stays open at the application's end.
        metrics: The metrics that the service reports to.
        settings: The settings.
        tracing: Makes spans. It is closed at the application's end.
    """
    tracing = tracing or NoTracing()
    api = Api(service, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(metrics.watch_loop())
        try:
            yield
        finally:
            watch.cancel()
            api.close()
            tracing.close()

    app = FastAPI(title="medusa-export", version=__version__, lifespan=lifespan, redoc_url=None)
    app.add_exception_handler(Exception, _answer_error)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    _add_generation(app, api)
    _add_models(app, api)
    _add_operations(app, service, metrics, api.model)
    describe_bodies(app, [ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest])
    gate = Gate(app, settings, tracing)
    if not settings.cors_origins:
        return gate
    return CORSMiddleware(  # around the gate, so that pages can read its errors
        gate,
        allow_origins=settings.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id"],
    )


def _add_generation(app: FastAPI, api: Api) -> None:
    """Adds the endpoints that generate text, and the one that encodes it."""

    @app.post("/v1/chat/completions", **_described(ChatRequest, ChatCompletion, streams=True))
    async def chat(request: Request) -> Response:
        """Answers a chat."""
        return await _generated(api, request, ChatJob.begin)

    @app.post("/v1/completions", **_described(CompletionRequest, Completion, streams=True))
    async def completions(request: Request) -> Response:
        """Continues a text."""
        return await _generated(api, request, CompletionJob.begin)

    @app.post("/v1/responses", **_described(ResponsesRequest, dict[str, Any], streams=True))
    async def responses(request: Request) -> Response:
        """Answers a text or items. Responses are not stored."""
        return await _generated(api, request, ResponseJob.begin, named=True)

    @app.post("/tokenize", **_described(TokenizeRequest, Tokens))
    async def tokenize(request: Request) -> Response:
        """Encodes a text or a chat."""
        data = await request.body()
        return _json(await _answered(api.in_thread(partial(tokenized, api, data))))


def _add_models(app: FastAPI, api: Api) -> None:
    """Adds the endpoints that list the models."""
    errors: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer}}

    def facts(name: str) -> Model:
        return {
            "id": name,
            "object": "model",
            "created": api.created,
            "owned_by": "medusa-export",
            "max_model_len": api.service.max_tokens,
        }

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The models that the server has."""
        return {"object": "list", "data": [facts(name) for name in api.settings.names]}

    @app.get("/v1/models/{name:path}", responses=errors)
    async def model(name: str) -> Model:
        """Describes a model that the server has."""
        if name not in api.settings.names:
            raise ApiError(404, f"The model {name!r} does not exist.", "model_not_found", param="model")
        return facts(name)


def _add_operations(app: FastAPI, service: MedusaService, metrics: ServerMetrics, model: str) -> None:
    """Adds the endpoints for those who run the server."""
    unready: dict[int | str, dict[str, Any]] = {503: {"model": Health}}

    def health(*, is_well: bool) -> Response:
        waiting, running = metrics.load_figures
        found: Health = {"state": service.state, "waiting": waiting, "running": running}
        return _json(found, 200 if is_well else 503)

    @app.get("/health/live", response_model=Health, responses=unready)
    async def live() -> Response:
        """200 unless the service has failed: the process is to be restarted then."""
        return health(is_well=service.state != "failed")

    @app.get("/health/ready", response_model=Health, responses=unready)
    async def ready() -> Response:
        """200 while the service takes requests."""
        return health(is_well=service.state == "ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """The metrics in the text format of Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status", response_class=HTMLResponse)
    async def status_page() -> HTMLResponse:
        """A page with load, speed and acceptance by depth."""
        return HTMLResponse(status.page())

    @app.get("/status/figures")
    async def status_figures() -> status.Figures:
        """The figures of the status page."""
        return status.figures(service, metrics, model)


async def _generated(
    api: Api, request: Request, begin: Callable[[Api, bytes, str], Job], *, named: bool = False
) -> Response:
    """Answers a request for text.

    Args:
        api: What all endpoints share.
        request: The request.
        begin: Checks and submits it, in a thread.
        named: If True, a stream's events have names.
    """
    data = await request.body()
    client: str = request.state.client
    job = await _answered(api.in_thread(partial(begin, api, data, client), lambda made: made.generation.close()))

    def at_end() -> None:
        request.state.figures = {"streamed": job.stream, **job.generation.usage}
        job.generation.close()

    if job.stream:
        return EventStream(job.events(), at_end, named=named)
    try:
        return _json(await _answered(unless_disconnected(request.receive, job.answer())))
    finally:
        at_end()


async def _answered(work: Awaitable[T]) -> T:
    """The result of some work, whose errors become an ``ApiError``."""
    try:
        return await work
    except (ApiError, ClientDisconnect):
        raise
    except Exception as error:
        raise _logged(error) from error


def _logged(error: Exception) -> ApiError:
    """Returns the answer to an error, and logs an error of the server."""
    found = api_error(error)
    if found.status == 500:
        _log.error("A request failed", exc_info=error)
    return found


def _described(body: type[BaseModel], answer: Any, *, streams: bool = False) -> dict[str, Any]:
    """The description of an endpoint whose body is read in a thread.

    Args:
        body: Type of its body.
        answer: Type of its answer.
        streams: True if the answer may be a stream of events.
    """
    content: dict[str, Any] = {"text/event-stream": {}} if streams else {}
    errors = {status: {"model": ErrorAnswer} for status in (400, 401, 404, 413, 429, 503)}
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {
        "responses": {200: {"model": answer, "content": content}, **errors},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    }


def _json(data: object, status_code: int = 200) -> Response:
    return Response(json.dumps(data), status_code, media_type="application/json")


async def _answer_error(_: Request, error: Exception) -> Response:
    return api_error(error).response


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "unknown_url" if error.status_code == 404 else "method_not_allowed"
    found = ApiError(error.status_code, f"{error.detail}.", code, headers=error.headers)
    return found.response

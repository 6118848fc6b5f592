"""The ingress: receives HTTP requests, and forwards each to the replica that Ray's router chooses."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa_runtime.integrations.ray.options import Scaling
from medusa_runtime.integrations.ray.prefix import prompt_start
from medusa_runtime.server.errors import ApiError
from medusa_runtime.server.settings import Settings
from medusa_runtime.server.streaming import DONE, event

_SENT = ("type", "asgi", "http_version", "method", "scheme", "path", "query_string", "headers", "client", "server")
# Endpoints whose answer describes one replica.
_OF_ONE = ("/metrics", "/status")


class Forwarder:
    """The ingress's ASGI application: forwards requests to replicas.

    Args:
        replicas: The handle of the replicas.
        max_body: The most bytes of a request's body.
        prefix_bytes: Bytes at the start of a prompt that choose its replica.
    """

    def __init__(self, replicas: DeploymentHandle, max_body: int, prefix_bytes: int) -> None:
        self._replicas = replicas.options(stream=True)
        self._max_body = max_body
        self._prefix_bytes = prefix_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        try:
            await self._forward(scope, await self._body(receive), send)
        except ApiError as error:
            await error.response(scope, receive, send)

    async def _body(self, receive: Receive) -> bytes:
        """The request's body.

        Raises:
            ApiError: It is too large.
        """
        parts, size, more = list[bytes](), 0, True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                raise ApiError(413, f"The body has more than {self._max_body:,} bytes: send less.", "request_too_large")
            more = message.get("more_body", False)
        return b"".join(parts)

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        """Forwards a request to a replica, and its answer to the client.

        Raises:
            ApiError: All replicas are full, or the replica died before it answered, twice.
        """
        sent = _plain(scope)
        if sent["path"].startswith(_OF_ONE):
            raise ApiError(404, "Each replica has metrics of its own: see those of Ray.", "unknown_url")
        start = await asyncio.to_thread(prompt_start, body, self._prefix_bytes)
        for attempt in (1, 2):
            answer = self._replicas.answer.remote(sent, body, start=start)
            begun: Message | None = None
            try:
                async for message in answer:
                    begun = begun or _without_id(message)
                    await send(message)
                return
            except BackPressureError as error:
                raise _busy("The queue is full: try again later.", 429) from error
            except (ActorDiedError, ActorUnavailableError) as error:
                dead = _busy("The replica of this request has died: try again.", 503)
                if begun is not None:
                    await _break_off(begun, dead, send)
                    return
                if attempt == 2:
                    raise dead from error
            except BaseException:  # the client has left; to cancel an answer that failed raises its error again
                answer.cancel()
                raise


def _without_id(start: Message) -> Message:
    """The start of an answer without its id, as Ray's proxy adds a header with the same one."""
    del MutableHeaders(scope=start)["x-request-id"]
    return start


async def _break_off(start: Message, error: ApiError, send: Send) -> None:
    """Ends an answer that has begun and can't go on. A stream gets the error as its last event.

    Args:
        start: The first message of the answer.
        error: The error.
        send: Sends a message to the client.
    """
    is_stream = Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")
    text = event(error.answer) + DONE if is_stream else ""
    await send({"type": "http.response.body", "body": text.encode(), "more_body": False})


def _busy(message: str, status: int) -> ApiError:
    code, kind = (
        ("rate_limit_exceeded", "rate_limit_error") if status == 429 else ("service_unavailable", "server_error")
    )
    return ApiError(status, message, code, kind=kind, headers={"Retry-After": "1"})


def _plain(scope: Scope) -> Mapping[str, Any]:
    """The parts of a scope that can be sent to another process. The path is that below the application's prefix."""
    return {name: scope[name] for name in _SENT} | {"path": scope["path"].removeprefix(scope.get("root_path", ""))}


@serve.ingress()
class Ingress:
    """The deployment that receives requests. Ray makes its process.

    Args:
        replicas: The handle of the replicas.
        settings: The settings of the server.
        scaling: The replicas' number and resources.
    """

    def __init__(self, replicas: DeploymentHandle, settings: Settings, scaling: Scaling) -> None:
        self._app = Forwarder(replicas, settings.max_body, scaling.prefix_bytes)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application. Ray asks for it once the object is made."""
        return self._app


async def _live(receive: Receive, send: Send) -> None:
    """Answers the messages of an application's life."""
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})

"""Wraps all endpoints: a request's id, its API key, the size of its body, and its line in the log."""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medusa_runtime.server.errors import ApiError
from medusa_runtime.server.ids import random_hex
from medusa_runtime.server.settings import Settings
from medusa_runtime.server.tracing import Tracing

_log = logging.getLogger("medusa_runtime.server.requests")

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_UNPROTECTED = ("/health", "/metrics", "/status", "/docs", "/openapi.json")


class Gate:
    """ASGI middleware around all endpoints.

    1. A request without a valid API key is answered with 401, except those for health, metrics and status.
    2. A body that is too large is answered with 413, before it is read if its length is announced.
    3. The answer has the header ``x-request-id``: the request's own, or a new one.
    4. Each request is logged at its end, with its id, and has a span if traces are on.

    Args:
        app: The application.
        settings: The settings.
        tracing: Makes spans.
    """

    def __init__(self, app: ASGIApp, settings: Settings, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing
        self._keys = [key.encode() for key in settings.api_keys]
        self._max_body = settings.max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{random_hex(32)}"
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        started, status = time.monotonic(), 0
        span = self._tracing.begin(scope["method"], scope["path"], headers)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            state["client"] = self._client(scope, headers)
            self._check_length(headers)
            await self._app(scope, self._bounded(receive), send_with_id)
        except ApiError as error:
            await error.response(scope, receive, send_with_id)
        finally:
            facts = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.monotonic() - started, 6),
                **state.get("figures", {}),
            }
            _log.info("request", extra={"facts": facts})
            self._tracing.end(span, facts)

    def _client(self, scope: Scope, headers: Headers) -> str:
        """The client that asks: its key, or its address if no keys are asked for.

        Raises:
            ApiError: The request has no valid key.
        """
        host: str = (scope.get("client") or ("",))[0]
        if not self._keys or scope["path"].startswith(_UNPROTECTED):
            return host
        kind, _, key = headers.get("authorization", "").partition(" ")
        data = key.strip().encode("latin-1", "replace") if kind.lower() == "bearer" else b""
        matches = [hmac.compare_digest(data, known) for known in self._keys]  # all keys, so that the time shows nothing
        if not any(matches):
            message = "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key {matches.index(True)}"

    def _check_length(self, headers: Headers) -> None:
        announced = headers.get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:18]) > self._max_body:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise self._too_large()
            return message

        return receive_bounded

    def _too_large(self) -> ApiError:
        message = f"The body has more than {self._max_body:,} bytes: send less."
        return ApiError(413, message, "request_too_large", headers={"Connection": "close"})

"""A replica: a service and the server's application in a process of Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from typing import Any

from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import Message
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn

from medusa_runtime.errors import ServiceClosedError
from medusa_runtime.integrations.ray.metrics import RayMetrics
from medusa_runtime.server.app import make_app
from medusa_runtime.server.logs import set_up_logs
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings
from medusa_runtime.server.tracing import SpanTracing


class Replica:
    """Answers HTTP requests that an ingress forwards.

    Ray stops to send requests to a replica before it ends it, and waits for those that run. This is the drain.

    Args:
        settings: The settings of the server.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        set_up_logs("info")
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._ends = AsyncExitStack()
        metrics = ServerMetrics(settings.names[0])
        tracing = SpanTracing.to_endpoint(settings.otlp_endpoint) if settings.otlp_endpoint else None
        self._service = await asyncio.to_thread(settings.load_service, metrics)
        self._ends.callback(self._service.close)
        self._app = make_app(self._service, metrics, settings, tracing)
        lifespan = LifespanOn(Config(self._app, log_config=None))
        await lifespan.startup()
        self._ends.push_async_callback(lifespan.shutdown)
        reporting = asyncio.create_task(RayMetrics(metrics.registry).report_loop())
        self._ends.callback(reporting.cancel)

    async def answer(
        self, scope: Mapping[str, Any], body: bytes, *, start: bytes | None = None
    ) -> AsyncGenerator[Message]:
        """Yields the messages with which the application answers a request.

        Args:
            scope: The request's ASGI scope.
            body: Its body.
            start: The start of its prompt. Ray's router reads it.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        received = [{"type": "http.request", "body": body, "more_body": False}]
        disconnected = asyncio.Event()

        async def receive() -> Message:
            if received:
                return received.pop()
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(dict(scope), receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)["x-replica"] = self._name
                yield message
            await task
        finally:
            disconnected.set()  # the application ends the request, if it has not ended
            await asyncio.wait([task], timeout=1)
            task.cancel()

    def check_health(self) -> None:
        """Raises an error if the service takes no requests. Ray then starts another replica."""
        if self._service.state != "ready":
            raise ServiceClosedError(f"The service is {self._service.state}.") from self._service.failure

    async def __del__(self) -> None:
        """Closes the service."""
        await self._ends.aclose()

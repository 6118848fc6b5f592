"""Servers on loopback, in a thread of the test process, and the arguments of a tool that tests call."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from medusa_runtime import MedusaService
from medusa_runtime.server.app import make_app
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings

# The JSON schema of the arguments of a tool.
LOOK: dict[str, Any] = {
    "type": "object",
    "properties": {"at": {"enum": ["sky", "sea"]}, "times": {"type": "integer", "minimum": 1, "maximum": 20}},
    "required": ["at", "times"],
    "additionalProperties": False,
}


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(service: MedusaService, metrics: ServerMetrics, settings: Settings) -> Iterator[str]:
    """A context manager that serves a service. Gives the server's address.

    Args:
        service: The service. It stays open.
        metrics: The metrics that the server shows.
        settings: The settings of the server.
    """
    config = uvicorn.Config(make_app(service, metrics, settings), port=0, log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)

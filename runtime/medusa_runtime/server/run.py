"""Runs the server: loads the bundle, listens, and ends in order after a signal."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

import uvicorn

from medusa_runtime.common.cpus import usable_cpus
from medusa_runtime.errors import MedusaError
from medusa_runtime.server.app import make_app
from medusa_runtime.server.logs import set_up_logs
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import SettingError, Settings
from medusa_runtime.server.tracing import SpanTracing
from medusa_runtime.service import MedusaService

_log = logging.getLogger(__name__)

# Seconds that streams have to send their last events once the service is closed.
_FLUSH_SECONDS = 5
# Seconds after which an idle connection is closed. Clients and load balancers, which wait for 5 to 60 s, must close it
# first. Otherwise a request may be on its way meanwhile, and is lost.
_IDLE_SECONDS = 75
# Seconds that the server goes on listening once the service is closed: requests on the way are refused with a reason.
_LINGER_SECONDS = 1.0
# Seconds after which Python's lock goes to another thread. The event loop waits that long for each thread that prepares
# a request or runs steps; Python's own 5 ms would add up.
_SWITCH_SECONDS = 0.001
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DrainingServer(uvicorn.Server):
    """A server that goes on listening while it drains, so that clients get an answer with a reason.

    The first signal begins to drain: new requests are answered with 503, and ``/health/ready``, too. Once all requests
    have ended, or the bound is over, the service is closed. Streams that still run then end with an error event. A
    second signal closes the service at once.

    Args:
        config: The configuration.
        service: The service.
        drain_seconds: Seconds that requests may take to end.
    """

    def __init__(self, config: uvicorn.Config, service: MedusaService, drain_seconds: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end, in a thread, as a signal may come anywhere."""
        self._signals += 1
        seconds = self._drain_seconds if self._signals == 1 else 0.0
        threading.Thread(target=self._end, args=(sig, seconds), name="medusa-drain", daemon=True).start()

    def _end(self, sig: int, seconds: float) -> None:
        name = signal.Signals(sig).name
        _log.info("Draining", extra={"facts": {"signal": name, "seconds": seconds}})
        has_ended = self._service.drain(seconds)
        self._service.close()
        _log.info("Drained", extra={"facts": {"all_ended": has_ended}})
        if seconds:
            time.sleep(_LINGER_SECONDS)
        self.should_exit = True


def serve(settings: Settings, *, host: str, port: int) -> None:
    """Serves a bundle in this process, until a signal ends it.

    Args:
        settings: The settings.
        host: The address to listen on.
        port: The port to listen on; 0 for any that is free.

    Raises:
        MedusaError: The bundle can't be served, or the port is in use.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    with contextlib.closing(_listening(host, port)) as listener:
        metrics = ServerMetrics(settings.names[0])
        tracing = SpanTracing.to_endpoint(settings.otlp_endpoint) if settings.otlp_endpoint else None
        with settings.load_service(metrics) as service:
            config = uvicorn.Config(
                make_app(service, metrics, settings, tracing),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
                timeout_keep_alive=_IDLE_SECONDS,
                lifespan="on",
            )
            # Objects that last as long as the server need not be looked at again. Looking at them holds up the event
            # loop for a tenth of a second.
            gc.collect()
            gc.freeze()
            address = listener.getsockname()
            _log.info("Listening", extra={"facts": {"host": address[0], "port": address[1]}})
            DrainingServer(config, service, settings.drain_seconds).run([listener])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is reported before the bundle is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingError(f"The server can't listen on {host}, port {port}: {error.strerror}.") from error
    return listener


def threads_of_each(processes: int, threads: int | None) -> int:
    """CPU threads of one step in each of several processes: its share of the CPUs that this process may use.

    Args:
        processes: Number of processes.
        threads: The threads that were asked for; None for a share.
    """
    return threads if threads is not None else max(1, usable_cpus() // processes)


def supervise(settings: Settings, *, host: str, port: int, processes: int, log_level: str) -> int:
    """Runs several servers, one port each, and ends all of them once one has ended.

    Args:
        settings: The settings of each.
        host: The address to listen on.
        port: The port of the first; the others have the next ones.
        processes: Number of servers.
        log_level: The lowest level that is logged.

    Returns:
        The exit code: 0 if all ended in order.
    """
    spawn = multiprocessing.get_context("spawn")
    places = [(settings, host, port + index, log_level) for index in range(processes)]
    children = [spawn.Process(target=_serve_child, args=place) for place in places]
    for child in children:
        child.start()

    ending = threading.Event()

    def forward(sig: int, _: FrameType | None) -> None:
        ending.set()
        for child in children:
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, sig)

    for sig in _SIGNALS:
        signal.signal(sig, forward)
    while all(child.is_alive() for child in children):
        time.sleep(0.2)
    if not ending.is_set():  # else they drain already, and a second signal would cut that short
        forward(signal.SIGTERM, None)
    for child in children:
        child.join()
    return max(abs(child.exitcode or 0) for child in children)


def _serve_child(settings: Settings, host: str, port: int, log_level: str) -> None:
    """Runs one of several servers, in a process of its own."""
    set_up_logs(log_level)
    try:
        serve(settings, host=host, port=port)
    except MedusaError as error:
        _log.critical("%s", error)
        sys.exit(1)

"""Operations of a server: keys, limits, health, metrics, comments, cancellation, and an end in order."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from medusa_runtime import Bundle, MedusaService
from medusa_runtime.server.app import make_app
from medusa_runtime.server.logs import JsonFormatter
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.run import threads_of_each
from medusa_runtime.server.settings import SettingError, Settings
from medusa_runtime.server.streaming import event
from medusa_runtime.server.tracing import SpanTracing
from runtime.server.conftest import Served
from support.servers import running

HI = [{"role": "user", "content": "Hi"}]
LONG: Any = {"messages": HI, "max_tokens": 490, "ignore_eos": True}
SHORT: Any = {"messages": HI, "max_tokens": 5}
CHAT = "/v1/chat/completions"


@contextmanager
def client_of(served: Served, **settings: Any) -> Iterator[httpx.Client]:
    """A client of another server over the same service, with other settings."""
    with (
        running(served.service, ServerMetrics("tiny"), Settings(bundle=Path("tiny"), **settings)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def wait_until_idle(service: MedusaService) -> None:
    for _ in range(600):
        if service.load_figures == (0, 0):
            return
        time.sleep(0.05)
    raise AssertionError("the service never came to rest")


def figure(web: httpx.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", web.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def test_models_and_health(web: httpx.Client, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").owned_by == "medusa-export"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("third")
    for path in ("/health/live", "/health/ready"):
        response = web.get(path)
        assert response.status_code == 200 and response.json()["state"] == "ready"
    assert web.get("/nothing").json()["error"]["code"] == "unknown_url"
    assert web.get(CHAT).json()["error"]["code"] == "method_not_allowed"


def test_request_ids(web: httpx.Client) -> None:
    assert web.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for given in ("", "a b", "x" * 200):
        assert web.get("/v1/models", headers={"x-request-id": given}).headers["x-request-id"].startswith("req_")


def test_metrics_and_the_figures_of_the_status_page(web: httpx.Client) -> None:
    before = figure(web, "vllm:generation_tokens_total")
    web.post(CHAT, json=SHORT | {"ignore_eos": True})
    assert figure(web, "vllm:generation_tokens_total") == before + 5
    assert figure(web, "vllm:request_success_total") > 0
    assert figure(web, "vllm:time_to_first_token_seconds_count") > 0
    found = web.get("/status/figures").json()
    assert found["state"] == "ready" and found["model"] == "tiny"
    assert all(0 <= share <= 1 for share in found["acceptance"])
    assert found["acceptance"] == sorted(found["acceptance"], reverse=True)
    assert "status/figures" in web.get("/status").text


def test_api_keys(served: Served) -> None:
    with client_of(served, api_keys=("first", "second")) as web:
        for headers in (
            {},
            {"Authorization": "Bearer third"},
            {"Authorization": "first"},
            {"Authorization": "Bearer é"},
        ):
            response = web.post(CHAT, json=SHORT, headers=[(k.encode(), v.encode()) for k, v in headers.items()])
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert web.post(CHAT, json=SHORT, headers={"Authorization": "Bearer second"}).status_code == 200
        assert {web.get(path).status_code for path in ("/health/ready", "/metrics", "/status")} == {200}
        assert web.get("/v1/models").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{web.base_url}/v1", api_key="third").models.list()


def test_other_origins(served: Served) -> None:
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with client_of(served, cors_origins=("https://a.example",), api_keys=("key",)) as web:
        allowed = web.options(CHAT, headers=asks)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = web.options(CHAT, headers=asks | {"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in refused.headers
        wrong = web.post(CHAT, json=SHORT, headers={"Origin": "https://a.example"})
        assert wrong.status_code == 401 and wrong.headers["access-control-allow-origin"] == "https://a.example"


def test_limits_of_body_prompt_and_client(served: Served) -> None:
    with client_of(served, max_body=1000, max_prompt_tokens=40, max_client_requests=2) as web:
        large = json.dumps({"messages": [{"role": "user", "content": "x" * 1000}]}).encode()
        for content in (large, iter([large[:500], large[500:]])):
            response = web.post(CHAT, content=content)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        with socket.create_connection((web.base_url.host, web.base_url.port), timeout=60) as raw:
            raw.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n".encode())
            assert raw.recv(2**16).startswith(b"HTTP/1.1 413")  # of a body that was never sent
        long = SHORT | {"messages": [{"role": "user", "content": "x" * 60}]}
        assert web.post(CHAT, json=long).json()["error"]["code"] == "context_length_exceeded"
        response = web.post(CHAT, json=SHORT | {"n": 3})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert response.headers["retry-after"] == "1"
        for _ in range(3):  # answers that were given count no more
            assert web.post(CHAT, json=SHORT | {"n": 2}).status_code == 200


def test_a_full_queue(tiny_bundle: Bundle) -> None:
    with (
        MedusaService.load(tiny_bundle.folder, rows=1, threads=1, tree_size=1, max_queue=1) as service,
        client_of(Served("", service)) as web,
    ):
        response = web.post(CHAT, json=LONG | {"n": 3})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        wait_until_idle(service)  # all or none
        assert web.post(CHAT, json=SHORT | {"n": 2}).status_code == 200


def test_clients_that_leave_cancel_their_requests(served: Served, web: httpx.Client) -> None:
    cancelled = figure(web, "medusa:request_errors_total")
    for _ in range(3):
        with web.stream("POST", CHAT, json=LONG | {"stream": True, "n": 3}) as response:
            next(response.iter_lines())
        wait_until_idle(served.service)
    with pytest.raises(httpx.ReadTimeout):
        web.post(CHAT, json=LONG | {"n": 60}, timeout=0.3)
    wait_until_idle(served.service)
    assert figure(web, "medusa:request_errors_total") > cancelled + 3


def test_a_client_that_leaves_before_its_stream_begins(served: Served) -> None:
    """Its request is cancelled, and counts no more."""
    app = make_app(served.service, ServerMetrics("tiny"), Settings(bundle=Path("tiny"), max_client_requests=1))

    async def ask(body: dict[str, Any], *, leaves: bool) -> int:
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        statuses = []

        async def receive() -> Any:
            if messages or leaves:
                return messages.pop() if messages else {"type": "http.disconnect"}
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            statuses.append(message.get("status"))
            await asyncio.sleep(0)  # the disconnection comes before the first event is asked for

        scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""}
        await app({**scope, "headers": [], "client": ("1.2.3.4", 5)}, receive, send)
        return int(statuses[0])

    async def ask_twice() -> list[int]:
        return [await ask(LONG | {"stream": True}, leaves=True), await ask(SHORT, leaves=False)]

    assert asyncio.run(ask_twice()) == [200, 200]
    wait_until_idle(served.service)


def test_a_stream_that_waits_gets_comments(served: Served, web: httpx.Client) -> None:
    streams: Any = {"stream": True}
    with (
        web.stream("POST", CHAT, json=LONG | streams | {"n": 6}),
        web.stream("POST", CHAT, json=SHORT | streams) as response,
    ):
        lines = list(response.iter_lines())
    assert ": keep-alive" in lines
    assert lines[-2] == "data: [DONE]"
    wait_until_idle(served.service)


def test_events_are_one_line_each() -> None:
    """For the line reader of httpx, and for everything that Python takes for the end of a line."""
    text = "".join(chr(i) for i in range(0x3000)) + "😀"
    lines = event({"text": text}).splitlines()
    assert len(lines) == 2 and json.loads(lines[0].removeprefix("data: ")) == {"text": text}
    assert event({"type": "done"}, named=True).splitlines()[0] == "event: done"


def test_a_service_that_ends_tells_its_streams(tiny_bundle: Bundle) -> None:
    with (
        MedusaService.load(tiny_bundle.folder, rows=2, threads=1, tree_size=1) as service,
        client_of(Served("", service)) as web,
    ):
        with web.stream("POST", CHAT, json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            threading.Thread(target=service.close).start()
            *_, last, _, done, _ = list(lines)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "service_unavailable"
        assert done == "data: [DONE]"
        response = web.post(CHAT, json=SHORT)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert web.get("/health/ready").status_code == 503
        assert web.get("/health/live").status_code == 200


def test_log_lines_are_json() -> None:
    record = logging.LogRecord("name", logging.INFO, "", 1, "told %s", ("this",), None)
    record.facts = {"request_id": "req_1"}
    found = json.loads(JsonFormatter().format(record))
    assert (found["message"], found["request_id"], found["level"]) == ("told this", "req_1", "info")


def test_a_request_has_a_span_in_the_clients_trace(served: Served) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    app = make_app(served.service, ServerMetrics("tiny"), Settings(bundle=Path("tiny")), SpanTracing(provider))
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    async def ask() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as web:
            headers = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "mine"}
            await web.post(CHAT, json=SHORT | {"ignore_eos": True, "stream": True}, headers=headers)
            await web.get("/health/live")

    asyncio.run(ask())
    (span,) = spans.get_finished_spans()
    assert span.name == f"POST {CHAT}" and span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace, parent)
    assert span.attributes is not None
    assert span.attributes["gen_ai.usage.output_tokens"] == 5
    assert (span.attributes["http.response.status_code"], span.attributes["medusa.request_id"]) == (200, "mine")


def test_settings_are_checked() -> None:
    settings = Settings(bundle=Path("some/bundle"))
    assert settings.names == ("bundle",)
    for wrong in ({"api_keys": ("",)}, {"api_keys": ("a b",)}, {"max_body": 0}, {"keep_alive_seconds": 0.0}):
        with pytest.raises(SettingError):
            replace(settings, **wrong)
    assert threads_of_each(2, 3) == 3
    assert threads_of_each(1000, None) == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own."""
    command = [sys.executable, "-m", "medusa_runtime.server", *map(str, arguments), "--threads", "1"]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "MEDUSA_API_KEYS": ""})
    try:
        yield started
    finally:
        started.kill()
        started.wait(60)


def wait_until_ready(address: str, server: subprocess.Popen[str]) -> None:
    for _ in range(600):
        assert server.poll() is None, server.stderr and server.stderr.read()
        try:
            if httpx.get(f"{address}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server never became ready")


@pytest.mark.slow
def test_sigterm_under_load_loses_nothing(tiny_bundle: Bundle) -> None:
    """Requests that run end with their answers. Those that come later are told to go elsewhere."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    answers: list[httpx.Response] = []

    def ask(stream: bool) -> None:
        answers.append(httpx.post(address + CHAT, json=LONG | {"stream": stream}, timeout=120))

    with process(tiny_bundle.folder, "--port", port, "--rows", 1) as server:
        wait_until_ready(address, server)
        threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(12)]
        for thread in threads:
            thread.start()
        while httpx.get(f"{address}/health/ready").json()["waiting"] < 10:
            time.sleep(0.005)
        server.send_signal(signal.SIGTERM)
        while (late := httpx.post(address + CHAT, json=SHORT, timeout=60)).status_code == 200:
            assert server.poll() is None
        for thread in threads:
            thread.join(120)
        assert server.wait(60) == 0
        assert [response.status_code for response in answers] == [200] * 12
        for response in answers:
            text = response.text
            assert '"finish_reason":"length"' in text.replace(": ", ":")
            assert not text.startswith("data") or text.endswith("data: [DONE]\n\n")
        assert (late.status_code, late.json()["error"]["code"]) == (503, "service_unavailable")
        assert server.stderr is not None
        logged = [json.loads(line) for line in server.stderr.read().splitlines()]
    assert [line["all_ended"] for line in logged if line["message"] == "Drained"] == [True]
    asked = [line for line in logged if line.get("path") == CHAT and line["status"] == 200]
    assert len(asked) >= 12 and all(line["completion_tokens"] and line["request_id"] for line in asked)


@pytest.mark.slow
def test_several_processes_have_a_port_each(tiny_bundle: Bundle) -> None:
    port = free_port()
    with process(tiny_bundle.folder, "--port", port, "--processes", 2, "--model-name", "tiny") as server:
        for index in range(2):
            wait_until_ready(f"http://127.0.0.1:{port + index}", server)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as idle:
            for seconds in (0.0, 5.5):  # many clients close connections after 5 s: the server must not do so then
                time.sleep(seconds)
                idle.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += idle.recv(2**16) or pytest.fail("the server has closed the connection")
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


@pytest.mark.slow
def test_a_start_that_fails_says_why_in_a_sentence(tiny_bundle: Bundle) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with process(tiny_bundle.folder, "--port", port) as server:
            assert server.wait(60) == 1
            assert server.stderr is not None
            message = server.stderr.read()
    assert message == f"error: The server can't listen on 127.0.0.1, port {port}: Address already in use.\n"

"""The example web service: a real server on loopback, a real client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from medusa_runtime import Bundle, MedusaEngine

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

EXAMPLES = Path(__file__).parents[1] / "examples"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "fastapi_app:app", "--port", str(port)]
    settings = {"MEDUSA_BUNDLE": str(tiny_bundle.folder), "MEDUSA_ROWS": "2", "MEDUSA_MAX_QUEUE": "0"}
    process = subprocess.Popen([*command, "--log-level", "warning"], env={**os.environ, **settings})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        assert process.wait(60) in (0, -15)


def read_events(response: httpx.Response) -> Iterator[tuple[str, dict[str, object]]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def wait_until_idle(server: str) -> None:
    for _ in range(300):
        if httpx.get(f"{server}/health").json() == {"state": "ready", "waiting": 0, "running": 0}:
            return
        time.sleep(0.1)
    raise AssertionError("the server never came to rest")


def outcomes(server: str) -> dict[str, float]:
    lines = httpx.get(f"{server}/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("medusa_requests_total{")]
    return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in found}


def test_an_answer_streams(server: str, tiny_bundle: Bundle) -> None:
    expected = MedusaEngine.load(tiny_bundle.folder, threads=1).generate(MESSAGES, max_new_tokens=40)
    body = {"messages": MESSAGES, "max_new_tokens": 40}
    with httpx.stream("POST", f"{server}/chat", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(read_events(response))
    assert "".join(str(data["text"]) for name, data in events if name == "text") == expected.text
    name, end = events[-1]
    assert name == "end"
    assert end["finish_reason"] == "length"
    assert end["usage"]["completion_tokens"] == 40


def test_a_client_that_leaves_cancels_its_request(server: str) -> None:
    before = outcomes(server).get("RequestCancelledError", 0)
    for _ in range(5):
        body = {"messages": MESSAGES, "max_new_tokens": 490}
        with httpx.stream("POST", f"{server}/chat", json=body, timeout=60) as response:
            next(read_events(response))
        wait_until_idle(server)
    # A step takes so little that some may have run to their end by then.
    assert outcomes(server).get("RequestCancelledError", 0) > before


def test_refusals(server: str) -> None:
    assert httpx.post(f"{server}/chat", json={"messages": []}).status_code == 422
    hello = {"messages": [{"role": "user", "content": "Hi"}]}
    assert httpx.post(f"{server}/chat", json={**hello, "repetition_penalty": 1.2}).status_code == 422
    response = httpx.post(f"{server}/chat", json={**hello, "temperature": -1})
    assert response.status_code == 422 and "temperature is -1.0" in response.text
    more = {"messages": [{"role": "assistant", "content": "Hi", "tool_calls": []}]}
    assert httpx.post(f"{server}/chat", json=more).status_code == 422
    message = '{"messages": [{"role": "user", "content": "Hi"}]'
    for rest in (
        ', "max_new_tokens": 1e999}',
        ', "timeout": NaN}',
        ', "\\ud800": 1}',
    ):  # what no JSON can hold in an answer
        response = httpx.post(f"{server}/chat", content=message + rest, headers={"Content-Type": "application/json"})
        assert response.status_code == 422
        assert response.json()["detail"]
    too_long = {"messages": [{"role": "user", "content": "x" * 600}]}
    response = httpx.post(f"{server}/chat", json=too_long)
    assert response.status_code == 422 and "exceed the 512 tokens" in response.text
    late = {"messages": MESSAGES, "max_new_tokens": 490, "timeout": 0.001}
    with httpx.stream("POST", f"{server}/chat", json=late, timeout=60) as response:
        name, data = list(read_events(response))[-1]
    assert (name, data["type"]) == ("error", "DeadlineError")
    wait_until_idle(server)


def test_health_of_a_service_that_refuses(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load balancer must learn that a service drains, or has died."""
    from fastapi.testclient import TestClient

    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("MEDUSA_BUNDLE", str(tiny_bundle.folder))
    import fastapi_app

    with TestClient(fastapi_app.app) as client:
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["state"]) == (200, "ready")
        service = fastapi_app.app.state.service
        service._thread.failure = MemoryError()
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["state"]) == (503, "failed")
        service._thread.failure = None
        service.drain()
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["state"]) == (503, "draining")
        assert client.post("/chat", json={"messages": MESSAGES}).status_code == 503

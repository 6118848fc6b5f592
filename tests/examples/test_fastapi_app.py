"""The example web service: a real server on loopback, a real client."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medusa_runtime import Bundle, MedusaEngine

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

EXAMPLES = Path(__file__).parents[2] / "examples"
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
    for content, words in (
        ("x" * 500, "exceed the 512 tokens"),
        ("x" * 600_000, "exceed the 512 tokens"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "reads only text"),
    ):
        response = httpx.post(f"{server}/chat", json={"messages": [{"role": "user", "content": content}]})
        assert response.status_code == 422 and words in response.text
    for key, value in (("stop", ["x"] * 300), ("stop", ["x" * 20_000]), ("messages", MESSAGES * 10_001)):
        response = httpx.post(f"{server}/chat", json={**hello, key: value})
        assert response.status_code == 422 and "at most" in response.text
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


def test_bodies_that_are_too_large(server: str) -> None:
    """Refused by their announced length before they are read, and otherwise once they get too long."""
    large = b'{"messages": [{"role": "user", "content": "' + b"x" * 2**20 + b'"}]}'
    headers = {"Content-Type": "application/json"}

    def in_pieces() -> Iterator[bytes]:
        for start in range(0, len(large), 2**16):
            yield large[start : start + 2**16]

    for content in (large, in_pieces()):
        response = httpx.post(f"{server}/chat", content=content, headers=headers, timeout=60)
        assert response.status_code == 413
        assert response.json() == {"detail": "The body has more than 1,048,576 bytes."}
    with socket.create_connection(("127.0.0.1", int(server.rsplit(":", 1)[1])), timeout=60) as client:
        head = ["POST /chat HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 9000000", "", ""]
        client.sendall("\r\n".join(head).encode())
        assert client.recv(2**16).startswith(b"HTTP/1.1 413")  # of a body that was never sent
    assert httpx.get(f"{server}/health").status_code == 200


def test_parts_of_text(server: str) -> None:
    texts = []
    for content in ("Hi", [{"type": "text", "text": "Hi"}]):
        body = {"messages": [{"role": "user", "content": content}], "max_new_tokens": 9}
        with httpx.stream("POST", f"{server}/chat", json=body, timeout=60) as response:
            texts.append([data.get("text") for _, data in read_events(response)])
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("fastapi_app", EXAMPLES / "fastapi_app.py")
    assert spec is not None and spec.loader is not None
    sys.modules["fastapi_app"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_character_splits_an_event(example: Any) -> None:
    """For the line reader of httpx, and for everything that Python takes for the end of a line."""
    text = "".join(chr(i) for i in range(0x3000)) + "\ud800 😀"
    response = httpx.Response(200, content=example.event("text", {"text": text}).encode())
    assert list(read_events(response)) == [("text", {"text": text})]
    assert len(example.event("text", {"text": text}).splitlines()) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "MEDUSA_BUNDLE is not set: give the folder of a bundle in it."),
        ({"MEDUSA_BUNDLE": "/nothing/here"}, "There is no bundle at /nothing/here"),
        ({"MEDUSA_BUNDLE": "/nothing/here", "MEDUSA_ROWS": "many"}, "MEDUSA_ROWS is 'many': expected a number."),
        ({"MEDUSA_BUNDLE": "/nothing/here", "MEDUSA_ROWS": "0"}, "rows is 0: expected an integer of at least 1"),
        ({"MEDUSA_BUNDLE": "/nothing/here", "MEDUSA_MAX_BODY": "-1"}, "MEDUSA_MAX_BODY is '-1': expected a number."),
    ],
)
def test_a_start_that_fails_says_why_in_a_sentence(settings: dict[str, str], words: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEDUSA_")}
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "fastapi_app:app", "--port", "0"]
    done = subprocess.run(command, env=environment | settings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout

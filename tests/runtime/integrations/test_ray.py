"""An application on Ray Serve: two replicas of a tiny model, on one machine."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from medusa_runtime import Bundle, MedusaEngine, MedusaError
from support.servers import free_port

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'medusa-export[ray]'")
pytestmark = pytest.mark.slow

from ray import serve  # noqa: E402

from medusa_runtime.integrations.ray import app  # noqa: E402

ROWS = 2
LONG: dict[str, object] = {"max_tokens": 220, "n": 4 * ROWS, "stream": True}  # runs while a test does something else


@pytest.fixture(scope="module")
def web(tiny_bundle: Bundle) -> Iterator[httpx.Client]:
    """A client of two replicas of two rows."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token into the home folder
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            arguments = {
                "bundle": str(tiny_bundle.folder),
                "model_names": "tiny",
                "rows": str(ROWS),
                "max_body": "9999",
                "max_queue": "8",
            }
            serve.run(app({**arguments, "min_replicas": "2", "max_replicas": "2"}), name="medusa", route_prefix="/llm")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/llm", timeout=60) as web:
                yield web
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> Iterator[MedusaEngine]:
    with MedusaEngine.load(tiny_bundle.folder, threads=1, measure=False) as engine:
        yield engine


def asked(prompt: str, **fields: object) -> dict[str, object]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True, **fields}


def test_a_missing_bundle_is_reported_before_anything_starts() -> None:
    with pytest.raises(MedusaError, match="There is no bundle at /nowhere"):
        app({"bundle": "/nowhere"})


def test_answers_are_those_of_the_engine(web: httpx.Client, engine: MedusaEngine) -> None:
    for prompt in ("the cat", "a dog sat on the mat", "the"):
        answer = web.post("/v1/completions", json=asked(prompt)).json()
        assert answer["choices"][0]["text"] == engine.generate(prompt, max_new_tokens=24, ignore_eos=True).text


def test_streams_come_piece_by_piece(web: httpx.Client, engine: MedusaEngine) -> None:
    with web.stream("POST", "/v1/completions", json=asked("the cat", stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    texts = [json.loads(event)["choices"][0]["text"] for event in events]
    assert len(texts) > 2
    assert "".join(texts) == engine.generate("the cat", max_new_tokens=24, ignore_eos=True).text


def test_prompts_with_the_same_start_go_to_the_same_replica(web: httpx.Client) -> None:
    opening = [[{"role": "user", "content": f"question {number}"}] for number in range(8)]
    reply = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and then?"}]
    places = []
    for messages in opening:
        body = {"messages": messages, "max_tokens": 2, "temperature": 0}
        first = web.post("/v1/chat/completions", json=body)
        second = web.post("/v1/chat/completions", json={**body, "messages": [*messages, *reply]})
        assert first.headers["x-replica"] == second.headers["x-replica"]
        assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        places.append(first.headers["x-replica"])
    assert len(set(places)) == 2


def at_a_time(web: httpx.Client, number: int) -> list[httpx.Response]:
    """Answers to a number of requests with the same prompt, all sent at once."""

    async def ask() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=number)
        async with httpx.AsyncClient(base_url=web.base_url, timeout=60, limits=limits) as client:
            body = asked("the cat sat on the mat", max_tokens=100)
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(number)))

    return asyncio.run(ask())


def test_a_start_that_many_share_fills_the_other_replica_too(web: httpx.Client) -> None:
    answers = at_a_time(web, 3 * ROWS)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.headers["x-replica"] for answer in answers}) == 2


def test_a_full_queue_is_reported_as_by_one_server(web: httpx.Client) -> None:
    answers = at_a_time(web, 40)  # 8 run or wait in the replicas, 8 in the ingress
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded" and refused.headers["retry-after"] == "1"
    assert len({answer.text for answer in answers if answer.status_code == 429}) == 1


def test_a_client_that_leaves_ends_its_request(web: httpx.Client) -> None:
    with web.stream("POST", "/v1/completions", json=asked("the dog", max_tokens=200, stream=True)) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 20
    while any(web.get("/health/ready").json()["running"] for _ in range(4)):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_errors_have_the_shape_of_the_api(web: httpx.Client) -> None:
    for path, body, status, code in (
        ("/v1/completions", {"prompt": "a", "temperature": 9}, 400, "invalid_value"),
        ("/v1/completions", {"prompt": "a" * 9999}, 413, "request_too_large"),
        ("/v1/nothing", {}, 404, "unknown_url"),
        ("/metrics", {}, 404, "unknown_url"),
    ):
        response = web.post(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), path


def test_figures_of_replicas_are_among_those_of_ray(web: httpx.Client) -> None:
    (node,) = ray.nodes()
    page = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 40
    while "ray_vllm_generation_tokens_total{" not in (found := httpx.get(page).text):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert 'model_name="tiny"' in found and 'application="medusa"' in found


def kill(replica: str) -> None:
    ray.kill(ray.get_actor(f"SERVE_REPLICA::medusa#Replica#{replica}", namespace="serve"))


def test_requests_are_answered_after_a_replica_has_died(web: httpx.Client, engine: MedusaEngine) -> None:
    with web.stream("POST", "/v1/completions", json=asked("the dog", **LONG)) as response:
        assert response.headers.get_list("x-request-id")[1:] == []
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        victim = response.headers["x-replica"]
        kill(victim)
        *_, error, done = lines
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "service_unavailable"
    for number in range(12):
        prompt = f"the cat {number}"
        answer = web.post("/v1/completions", json=asked(prompt))
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-replica"] != victim
        assert answer.json()["choices"][0]["text"] == engine.generate(prompt, max_new_tokens=24, ignore_eos=True).text


def test_requests_that_run_end_before_their_replica_does(web: httpx.Client) -> None:
    """The last test: it takes the application away."""
    with web.stream("POST", "/v1/completions", json=asked("the mat", **LONG)) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        deleting = threading.Thread(target=serve.delete, args=("medusa",))
        deleting.start()
        *_, last, done = lines
    deleting.join()
    assert done == "data: [DONE]" and json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"

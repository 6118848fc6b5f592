"""An application on Ray Serve: two replicas of a tiny model, on one machine."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from medusa_runtime import Bundle, MedusaEngine, MedusaError, MedusaService, ServiceClosedError
from support.servers import free_port

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'medusa-export[ray]'")
pytestmark = pytest.mark.slow

from ray import serve  # noqa: E402

from medusa_runtime.integrations.ray import app  # noqa: E402
from medusa_runtime.integrations.ray.replica import Replica  # noqa: E402

ROWS = 2
LONG: dict[str, object] = {"max_tokens": 220, "n": 4 * ROWS, "stream": True}  # runs while a test does something else


@dataclass(frozen=True)
class Fleet:
    """Two replicas of two rows, and a client of theirs."""

    web: httpx.Client
    bundle: Path

    def deploy(self) -> None:
        arguments = {"bundle": str(self.bundle), "model_names": "tiny", "rows": str(ROWS), "max_body": "9999"}
        bounds = {"max_queue": "8", "min_replicas": "2", "max_replicas": "2"}
        serve.run(app({**arguments, **bounds}), name="medusa", route_prefix="/llm")
        self.wait()

    def wait(self) -> None:
        """Waits until the ingress knows two replicas: Ray tells it of a new one after a while."""
        deadline, seen = time.monotonic() + 60, list[str]()
        while len(set(seen[-16:])) != 2:  # the last requests went to two
            assert time.monotonic() < deadline
            answer = self.web.post("/v1/completions", json=asked(f"prompt {len(seen)}", max_tokens=1))
            seen.append(answer.headers["x-replica"])
            time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(tiny_bundle: Bundle) -> Iterator[Fleet]:
    """A cluster that nothing is deployed on yet."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else it writes a token into the home folder
        ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/llm", timeout=60) as web:
                yield Fleet(web, tiny_bundle.folder)
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture
def fleet(cluster: Fleet) -> Fleet:
    """The fleet, deployed if no test before has done so, or the last one has deleted it."""
    if "medusa" not in serve.status().applications:
        cluster.deploy()
    return cluster


@pytest.fixture
def web(fleet: Fleet) -> httpx.Client:
    return fleet.web


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> Iterator[MedusaEngine]:
    with MedusaEngine.load(tiny_bundle.folder, threads=1, measure=False) as engine:
        yield engine


def asked(prompt: str, **fields: object) -> dict[str, object]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 24, "ignore_eos": True, **fields}


def test_a_replica_whose_service_takes_no_requests_is_not_healthy(tiny_bundle: Bundle) -> None:
    with MedusaService.load(tiny_bundle.folder, rows=1, threads=1, tree_size=1) as service:
        replica = SimpleNamespace(_service=service)
        Replica.check_health(replica)
    with pytest.raises(ServiceClosedError, match="The service is closed"):
        Replica.check_health(replica)


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
    reply = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and then?"}]
    places = []
    for number in range(8):
        opening = [{"role": "user", "content": f"question {number}"}]
        body = {"messages": opening, "max_tokens": 2, "temperature": 0}
        first = web.post("/v1/chat/completions", json=body)
        second = web.post("/v1/chat/completions", json={**body, "messages": [*opening, *reply]})
        places.append((first.headers["x-replica"], second.headers["x-replica"]))
        if places[-1][0] == places[-1][1]:
            assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    # Ray's count of a replica's requests may be late, so that one seems to be full.
    assert sum(first == second for first, second in places) >= 7, places
    assert len({first for first, _ in places}) == 2


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


def test_requests_are_answered_after_a_replica_has_died(fleet: Fleet, engine: MedusaEngine) -> None:
    web = fleet.web
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
    fleet.wait()


def test_requests_that_run_end_before_their_replica_does(fleet: Fleet) -> None:
    with fleet.web.stream("POST", "/v1/completions", json=asked("the mat", **LONG)) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        deleting = threading.Thread(target=serve.delete, args=("medusa",))
        deleting.start()
        *_, last, done = lines
    deleting.join()
    assert done == "data: [DONE]" and json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"

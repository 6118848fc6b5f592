"""A model of Triton Inference Server, in a real server with its Python backend."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from medusa_export import write_triton_repository
from medusa_runtime import Bundle, MedusaEngine, SamplingParams
from support import triton_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton_server.missing() is not None, reason=str(triton_server.missing())),
]

MODEL = "/v2/models/tiny"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def web(tiny_bundle: Bundle, scratch: Path) -> Iterator[httpx.Client]:
    write_triton_repository(tiny_bundle.folder, scratch / "models", name="tiny", rows=2)
    with (
        triton_server.running(scratch / "models", scratch) as address,
        httpx.Client(base_url=address, timeout=60) as web,
    ):
        yield web


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> Iterator[MedusaEngine]:
    with MedusaEngine.load(tiny_bundle.folder, threads=1, measure=False) as engine:
        yield engine


def asked(prompt: str, *, parameters: dict[str, object] | None = None, **inputs: object) -> dict[str, object]:
    chosen = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, **(parameters or {})}
    given = {"exclude_input_in_output": True, "sampling_parameters": json.dumps(chosen), **inputs}
    return {"text_input": prompt, **given}


def answer(engine: MedusaEngine, prompt: str) -> str:
    return engine.generate(prompt, max_new_tokens=24, ignore_eos=True).text


def events(web: httpx.Client, body: dict[str, object]) -> list[dict[str, object]]:
    with web.stream("POST", f"{MODEL}/generate_stream", json=body) as response:
        return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: ")]


def test_answers_are_those_of_the_engine(web: httpx.Client, engine: MedusaEngine) -> None:
    prompts = ["the cat", "a dog sat on the mat", "the", "mat"]
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda prompt: web.post(f"{MODEL}/generate", json=asked(prompt)).json(), prompts))
    assert [one["text_output"] for one in found] == [answer(engine, prompt) for prompt in prompts]


def test_streams_come_piece_by_piece(web: httpx.Client, engine: MedusaEngine) -> None:
    body = asked("the cat", stream=True, return_num_output_tokens=True, return_finish_reason=True)
    found = events(web, body)
    assert len(found) > 2
    assert "".join(str(one["text_output"]) for one in found) == answer(engine, "the cat")
    assert sum(int(str(one["num_output_tokens"])) for one in found) == 24
    assert [one["finish_reason"] for one in found] == ["None"] * (len(found) - 1) + ["length"]


def test_outputs_follow_the_conventions_of_the_backend_for_vllm(web: httpx.Client, engine: MedusaEngine) -> None:
    returned = {f"return_{name}": True for name in ("finish_reason", "cumulative_logprob", "logprobs")}
    counts = {"return_num_input_tokens": True, "return_num_output_tokens": True}
    body = asked("the cat", exclude_input_in_output=False, **returned, **counts)
    found = web.post(f"{MODEL}/generate", json=body).json()
    expected = engine.generate("the cat", max_new_tokens=24, ignore_eos=True, logprobs=True)
    assert found["text_output"] == "the cat" + expected.text
    assert (found["finish_reason"], found["num_output_tokens"]) == ("length", 24)
    assert found["num_input_tokens"] == expected.stats.prompt_tokens
    assert found["cumulative_logprob"] == pytest.approx(sum(expected.logprobs or ()), rel=1e-4)
    tokens = [next(iter(place)) for place in json.loads(found["logprobs"])]
    assert tokens == [str(token) for token in expected.token_ids]


def test_the_most_likely_tokens_have_their_ranks(web: httpx.Client, engine: MedusaEngine) -> None:
    parameters = {"temperature": 1.5, "seed": 3, "max_tokens": 8, "logprobs": 2}
    body = asked("the cat", return_logprobs=True, exclude_input_in_output=True, parameters=parameters)
    places = json.loads(web.post(f"{MODEL}/generate", json=body).json()["logprobs"])
    expected = engine.generate(
        "the cat", max_new_tokens=8, ignore_eos=True, sampling=SamplingParams(temperature=1.5, seed=3), logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    assert expected.top_logprobs is not None
    for token, top, found in zip(expected.token_ids, expected.top_logprobs, places, strict=True):
        assert next(iter(found)) == str(token)
        assert [found[str(one.token_id)]["rank"] for one in top] == [1, 2]
        assert all("rank" in facts or listed == str(token) for listed, facts in found.items())


def test_parameters_may_be_text_and_several_answers_come_side_by_side(web: httpx.Client, engine: MedusaEngine) -> None:
    body = asked("the cat", parameters={"temperature": "0", "max_tokens": "24", "n": "2"})
    assert web.post(f"{MODEL}/generate", json=body).json()["text_output"] == [answer(engine, "the cat")] * 2
    as_request_parameters = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    found = web.post(f"{MODEL}/generate", json={"text_input": "the cat", "parameters": as_request_parameters}).json()
    assert found["text_output"] == "the cat" + answer(engine, "the cat")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (asked("the", parameters={"temperature": 9}), "temperature"),
        (
            asked("the", parameters={"structured_outputs": '{"json": null, "regex": "[a-z ]+"}'}),
            "A grammar needs a token that ends the text, and the model has none",
        ),
        (asked("the", parameters={"early_stopping": True}), "Unknown parameter: 'early_stopping'"),
        (asked("the", sampling_parameters="{"), "sampling_parameters is not valid JSON"),
        (asked("the", sampling_parameters="3"), "sampling_parameters must be a JSON object"),
        (asked("the", parameters={"max_tokens": 10**6}), "maximum context length"),
        (asked("the", stream=True, exclude_input_in_output=False), "A stream can't begin with the prompt"),
    ],
)
def test_a_request_that_cannot_be_served_says_why(web: httpx.Client, body: dict[str, object], message: str) -> None:
    response = web.post(f"{MODEL}/generate", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_a_client_that_leaves_ends_its_request(web: httpx.Client, scratch: Path) -> None:
    body = asked("the dog", parameters={"max_tokens": 220}, stream=True)
    with web.stream("POST", f"{MODEL}/generate_stream", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 20
    while "A client cancelled its request." not in (scratch / "triton.log").read_text(errors="replace"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_requests_that_run_end_before_the_model_does(web: httpx.Client) -> None:
    body = asked("the mat", parameters={"max_tokens": 220, "n": 6}, stream=True, return_finish_reason=True)
    with web.stream("POST", f"{MODEL}/generate_stream", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        assert web.post("/v2/repository/models/tiny/unload").status_code == 200
        *_, last = lines
    assert json.loads(last.removeprefix("data: "))["finish_reason"] == ["length"] * 6
    assert web.post("/v2/repository/models/tiny/load").status_code == 200  # for the other tests


def test_a_bundle_that_is_gone_is_named_when_the_model_is_loaded(tiny_bundle: Bundle, tmp_path: Path) -> None:
    model = write_triton_repository(tiny_bundle.folder, tmp_path / "models", name="tiny")
    (model / "1" / "bundle").unlink()
    with (
        pytest.raises(AssertionError, match="There is no bundle at"),
        triton_server.running(tmp_path / "models", tmp_path),
    ):
        pass

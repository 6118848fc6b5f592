"""A real model behind the server, with OpenAI's client: everything that a client of it does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from medusa_runtime import MedusaService
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings
from support.servers import LOOK, running

pytestmark = pytest.mark.slow

QUESTIONS = ["Why is the sky blue?", "Say hello.", "Write a list of three fruits.", "What is 2 + 2?"]
CHAT: Any = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0}
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": LOOK}}


@dataclass(frozen=True)
class Served:
    """A server, the service behind it, and a client."""

    service: MedusaService
    client: openai.OpenAI


@pytest.fixture(scope="module")
def served(smollm2_bundle: Path) -> Iterator[Served]:
    metrics = ServerMetrics("smollm2")
    settings = Settings(bundle=smollm2_bundle, model_names=("smollm2",), tool_format="hermes")
    with (
        MedusaService.load(smollm2_bundle, rows=4, tree_size=4, metrics=metrics, check_digests=False) as service,
        running(service, metrics, settings) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", _strict_response_validation=True) as client,
    ):
        yield Served(service, client)


def test_answers_at_a_time_are_those_of_single_requests(served: Served) -> None:
    chats: list[Any] = [[{"role": "user", "content": question}] for question in QUESTIONS]
    expected = [served.service.generate(chat, max_new_tokens=16, logprobs=True) for chat in chats]
    client = served.client

    def ask(chat: Any) -> tuple[str, list[float], int]:
        fields: Any = {"model": "smollm2", "messages": chat, "temperature": 0, "max_tokens": 16}
        whole = client.chat.completions.create(**fields, logprobs=True)
        (choice,) = whole.choices
        streamed = client.chat.completions.create(**fields, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in streamed) == choice.message.content
        response = client.responses.create(model="smollm2", input=chat, temperature=0, max_output_tokens=16)
        assert response.output_text == choice.message.content
        assert choice.logprobs is not None and choice.logprobs.content is not None and whole.usage is not None
        details = whole.usage.completion_tokens_details
        assert details is not None and details.accepted_prediction_tokens is not None
        logprobs = [token.logprob for token in choice.logprobs.content]
        return choice.message.content or "", logprobs, details.accepted_prediction_tokens

    with ThreadPoolExecutor(len(chats)) as pool:
        answers = list(pool.map(ask, chats))
    assert [text for text, _, _ in answers] == [result.text for result in expected]
    for (_, logprobs, _), result in zip(answers, expected, strict=True):
        assert logprobs == pytest.approx(result.logprobs, abs=1e-3)
    assert sum(accepted for _, _, accepted in answers) > 0


def test_completions(served: Served) -> None:
    prompt = "The three primary colours are"
    expected = served.service.generate(prompt, max_new_tokens=16).text
    fields: Any = {"model": "smollm2", "prompt": prompt, "temperature": 0, "max_tokens": 16}
    (choice,) = served.client.completions.create(**fields, echo=True).choices
    assert (choice.text, choice.finish_reason) == (prompt + expected, "length")
    # The client's own type lets no reason be null before the end, which OpenAI's server sends, too.
    lenient = openai.OpenAI(base_url=served.client.base_url, api_key="none")
    streamed = lenient.completions.create(**fields, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == expected
    word = expected.split()[1]
    (choice,) = served.client.completions.create(**fields, stop=[word]).choices
    assert (choice.text, choice.finish_reason) == (expected[: expected.index(word)], "stop")


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "look"}}, "temperature": 1, "seed": 5, "n": 3},
    ],
    ids=["any", "one"],
)
def test_tools(served: Served, fields: dict[str, Any]) -> None:
    asked = CHAT | fields | {"tools": [TOOL], "max_tokens": 150, "parallel_tool_calls": False}
    for found in served.client.chat.completions.create(**asked).choices:
        (call,) = found.message.tool_calls or []
        assert call.type == "function" and call.function.name == "look"
        jsonschema_rs.validate(LOOK, json.loads(call.function.arguments))


def test_a_json_schema(served: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "look", "strict": True, "schema": LOOK}}
    texts = []
    for fields in ({}, {"stream": True}, {"temperature": 1, "seed": 3}):
        found: Any = served.client.chat.completions.create(**CHAT | fields, response_format=form, max_tokens=60)
        streamed = "stream" in fields
        parts = (
            [part.choices[0].delta.content or "" for part in found] if streamed else [found.choices[0].message.content]
        )
        texts.append("".join(parts))
        jsonschema_rs.validate(LOOK, json.loads(texts[-1]))
    assert texts[0] == texts[1]


def test_the_most_likely_tokens(served: Served) -> None:
    (choice,) = served.client.chat.completions.create(**CHAT, max_tokens=8, logprobs=True, top_logprobs=3).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    for place in choice.logprobs.content:
        assert place.top_logprobs[0].token == place.token  # the answer is greedy
        logprobs = [top.logprob for top in place.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)


def test_errors(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        served.client.chat.completions.create(**CHAT | {"temperature": -1})
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        served.client.chat.completions.create(**CHAT | {"model": "other"})
    with pytest.raises(openai.BadRequestError) as long:
        served.client.completions.create(model="smollm2", prompt="a b " * 8000, max_tokens=5)
    assert long.value.code == "context_length_exceeded"


def test_a_stream_that_is_closed_cancels_its_request(served: Served) -> None:
    stream = served.client.chat.completions.create(
        **CHAT, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert served.service.load_figures[1] == 1
    stream.close()
    deadline = time.monotonic() + 30
    while served.service.load_figures != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)

"""Chat completions, with OpenAI's client. The client checks each answer against its own types."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from medusa_runtime import MedusaEngine, SamplingParams

HI: Any = [{"role": "user", "content": "Hi"}]
GREEDY: Any = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 30}


def test_the_answer_is_that_of_an_engine(client: openai.OpenAI, engine: MedusaEngine) -> None:
    expected = engine.generate(HI, max_new_tokens=30)
    answer = client.chat.completions.create(**GREEDY)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert answer.model == "tiny" and answer.id.startswith("chatcmpl-") and answer.created > 1.7e9
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.stats.prompt_tokens
    assert answer.usage.completion_tokens == 30
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 30
    details = answer.usage.completion_tokens_details
    assert details is not None and details.accepted_prediction_tokens is not None
    assert details.rejected_prediction_tokens is not None and details.reasoning_tokens == 0
    again = client.chat.completions.create(**GREEDY)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1


def test_a_stream_has_the_same_answer(client: openai.OpenAI, engine: MedusaEngine) -> None:
    expected = engine.generate(HI, max_new_tokens=30)
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected.text
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 30
    assert all(part.usage is None for part in parts)
    assert len({part.id for part in chunks}) == 1


def test_several_answers_with_a_seed_differ_and_repeat(client: openai.OpenAI, engine: MedusaEngine) -> None:
    fields: Any = {"model": "tiny", "messages": HI, "max_completion_tokens": 20, "seed": 7, "n": 3, "temperature": 1.2}
    texts = [choice.message.content for choice in client.chat.completions.create(**fields).choices]
    expected = [
        engine.generate(HI, max_new_tokens=20, sampling=SamplingParams(temperature=1.2, seed=7 + index)).text
        for index in range(3)
    ]
    assert texts == expected and len({*texts}) == 3
    streamed = ["", "", ""]
    for part in client.chat.completions.create(**fields, stream=True):
        streamed[part.choices[0].index] += part.choices[0].delta.content or ""
    assert streamed == expected


def test_log_probabilities(client: openai.OpenAI, engine: MedusaEngine) -> None:
    expected = engine.generate(HI, max_new_tokens=30, logprobs=True)
    assert expected.logprobs is not None
    answer = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [token.logprob for token in logprobs.content] == pytest.approx(expected.logprobs, abs=1e-4)
    assert all([top.token for top in token.top_logprobs] == [token.token] for token in logprobs.content)
    data = b"".join(bytes(token.bytes or ()) for token in logprobs.content)
    assert data.decode(errors="replace").startswith(expected.text[:5])
    streamed = []
    for part in client.chat.completions.create(**GREEDY, logprobs=True, stream=True):
        found = part.choices[0].logprobs
        streamed += (found.content or []) if found else []
    assert [token.logprob for token in streamed] == pytest.approx(expected.logprobs, abs=1e-4)
    assert all(token.top_logprobs == [] for token in streamed)


def test_the_most_likely_tokens_of_sampled_answers(client: openai.OpenAI, engine: MedusaEngine) -> None:
    """In a stream and without one, with penalties, with a stop string, and beside tokens that are not among them."""
    plain = engine.generate(HI, max_new_tokens=30, sampling=SamplingParams(temperature=1.2, seed=4)).text
    fields: Any = {**GREEDY, "temperature": 1.2, "seed": 4, "logprobs": True, "top_logprobs": 20, "stop": plain[9:11]}
    expected = engine.generate(
        HI,
        max_new_tokens=30,
        stop=plain[9:11],
        sampling=SamplingParams(temperature=1.2, seed=4),
        logprobs=True,
        top_logprobs=20,
    )
    assert expected.top_logprobs is not None
    wanted = [[top.logprob for top in place] for place in expected.top_logprobs]
    (choice,) = client.chat.completions.create(**fields).choices
    assert choice.finish_reason == "stop" and choice.logprobs is not None and choice.logprobs.content is not None
    found = choice.logprobs.content
    assert [[top.logprob for top in token.top_logprobs] for token in found] == [
        pytest.approx(values, abs=1e-4) for values in wanted
    ]
    assert any(token.token not in [top.token for top in token.top_logprobs[:1]] for token in found)
    streamed = [
        token
        for part in client.chat.completions.create(**fields, stream=True)
        if part.choices[0].logprobs is not None
        for token in part.choices[0].logprobs.content or ()
    ]
    assert [token.top_logprobs for token in streamed] == [token.top_logprobs for token in found]
    penalties = client.chat.completions.create(**{**fields, "presence_penalty": 1.5, "top_logprobs": 3, "n": 2})
    for answer in penalties.choices:
        assert answer.logprobs is not None and answer.logprobs.content
        assert all(len(token.top_logprobs) == 3 for token in answer.logprobs.content)


def test_an_answer_ends_at_a_stop_string(client: openai.OpenAI, engine: MedusaEngine) -> None:
    text = engine.generate(HI, max_new_tokens=30).text
    for stop in (text[5:7], ["never there", text[5:7]]):
        (choice,) = client.chat.completions.create(**GREEDY, stop=stop).choices
        assert (choice.message.content, choice.finish_reason) == (text[: text.index(text[5:7])], "stop")


def test_without_a_length_the_answer_fills_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x" * 460}], temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_parts_of_text_and_fields_without_effect(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**GREEDY).choices[0].message.content
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    same = client.chat.completions.create(
        **GREEDY | {"messages": parts},
        user="someone",
        metadata={"a": "b"},
        store=True,
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        parallel_tool_calls=True,
        extra_body={"repetition_penalty": 1.0, "min_tokens": 0, "top_k": -1, "min_p": 0.0},
    )
    assert same.choices[0].message.content == plain


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"presence_penalty": 5}, 400, "invalid_value", "presence_penalty"),
        ({"logit_bias": {"5": 101.0}}, 400, "invalid_value", "logit_bias"),
        ({"logit_bias": {"five": 1.0}}, 400, "invalid_value", "logit_bias"),
        ({"response_format": {"type": "yaml"}}, 400, "invalid_value", "response_format"),
        ({"response_format": {"type": "json_schema"}}, 400, "invalid_value", "response_format"),
        ({"structured_outputs": {"regex": 5}}, 400, "invalid_value", "structured_outputs"),
        ({"tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "unsupported_parameter", "tools"),
        ({"top_logprobs": 21, "logprobs": True}, 400, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 1}, 400, "invalid_value", "top_logprobs"),
        ({"colour": "red"}, 400, "unknown_parameter", "colour"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "nobody", "content": "Hi"}]}, 400, "invalid_value", "messages[0].role"),
        ({"temperature": "hot"}, 400, "invalid_type", "temperature"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"max_tokens": 600}, 400, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, 400, "context_length_exceeded", None),
        ({"model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"stop": [""]}, 400, "invalid_value", None),
        ({"top_k": 1000, "temperature": 1}, 400, "invalid_value", None),
        ({"chat_template_kwargs": {"tools": []}}, 400, "invalid_value", None),
    ],
)
def test_refusals(client: openai.OpenAI, fields: Any, status: int, code: str, param: str | None) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{**GREEDY, "extra_body": fields})
    error = caught.value
    assert (error.status_code, error.code, error.param) == (status, code, param), error.message
    assert error.type == "invalid_request_error" and error.request_id


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": 1}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "seed": 1e999}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_bodies_that_are_no_requests(web: httpx.Client, body: bytes) -> None:
    response = web.post("/v1/chat/completions", content=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"] and error["code"] and error["type"] == "invalid_request_error"


def test_images_are_refused(client: openai.OpenAI) -> None:
    content: Any = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(openai.BadRequestError, match="reads only text"):
        client.chat.completions.create(**GREEDY | {"messages": [{"role": "user", "content": content}]})

"""Responses, with OpenAI's client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from medusa_runtime import MedusaEngine
from medusa_runtime.server.generation import Step
from medusa_runtime.server.output.parts import Call, Content, Reasoning
from medusa_runtime.server.response_events import items_of
from medusa_runtime.server.responses import messages_of
from medusa_runtime.server.schema.answers import TokenLogprob
from medusa_runtime.server.schema.responses import ResponsesRequest

FIELDS: Any = {"model": "tiny", "temperature": 0, "max_output_tokens": 20}


def test_a_response_is_the_answer_to_its_messages(client: openai.OpenAI, engine: MedusaEngine) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = engine.generate(messages, max_new_tokens=20).text
    asked: list[Any] = ["Hi", [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]]
    for given in asked:
        response = client.responses.create(**FIELDS, instructions="Be brief.", input=given)
        assert response.output_text == expected
        assert response.status == "incomplete" and response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.usage is not None and response.usage.output_tokens == 20


def test_a_stream_of_events(client: openai.OpenAI) -> None:
    whole = client.responses.create(**FIELDS, input="Hi")
    events = list(client.responses.create(**FIELDS, input="Hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.incomplete"
    assert text == last.response.output_text == whole.output_text
    assert last.response.id == events[0].response.id  # type: ignore[union-attr]


def test_log_probabilities_of_a_response(client: openai.OpenAI, engine: MedusaEngine) -> None:
    expected = engine.generate([{"role": "user", "content": "Hi"}], max_new_tokens=20, logprobs=True, top_logprobs=3)
    assert expected.top_logprobs is not None
    asked: Any = {**FIELDS, "input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 3}
    response = client.responses.create(**asked)
    (part,) = response.output[0].content  # type: ignore[union-attr]
    assert response.top_logprobs == 3 and part.type == "output_text" and part.logprobs is not None
    assert [token.logprob for token in part.logprobs] == pytest.approx(expected.logprobs, abs=1e-4)
    for token, place in zip(part.logprobs, expected.top_logprobs, strict=True):
        assert [top.logprob for top in token.top_logprobs] == pytest.approx([top.logprob for top in place], abs=1e-4)
    events = list(client.responses.create(**asked, stream=True))
    streamed = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    assert [token.logprob for token in streamed] == [token.logprob for token in part.logprobs[: len(streamed)]]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert [token.logprob for token in done.logprobs] == [token.logprob for token in part.logprobs]
    added = next(event for event in events if event.type == "response.content_part.added")
    assert added.part.logprobs == []  # type: ignore[union-attr]
    plain = client.responses.create(**FIELDS, input="Hi").output[0].content[0]  # type: ignore[union-attr]
    assert plain.logprobs == []  # type: ignore[union-attr]


def entry(number: int) -> TokenLogprob:
    return {"token": str(number), "logprob": -float(number), "bytes": [], "top_logprobs": []}


def test_log_probabilities_go_with_the_text_of_messages() -> None:
    """Not with reasoning and calls. Tokens whose text has not come wait for it; the token of the end has none."""
    steps = [
        Step([Reasoning("hm")], 2),
        Step([Reasoning("."), Content("a")], 2),
        Step([], 1),
        Step([Content("b")], 1),
        Step([Call("look", "{}")], 2),
        Step([Content("c")], 1),
        Step([], 1),
    ]
    items = items_of(steps, [entry(number) for number in range(10)])
    assert [(item.kind, [token["token"] for token in item.logprobs]) for item in items] == [
        ("reasoning", []),
        ("message", ["2", "3", "4", "5"]),
        ("function_call", []),
        ("message", ["8", "9"]),
    ]


def test_items_become_messages() -> None:
    request = ResponsesRequest.model_validate(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": "Where?"},
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
                {"type": "function_call", "call_id": "a", "name": "look", "arguments": '{"at": 1}'},
                {"type": "function_call", "call_id": "b", "name": "look", "arguments": '{"at": 2}'},
                {"type": "function_call_output", "call_id": "a", "output": "here"},
            ],
        }
    )
    system, user, assistant, tool = messages_of(request)
    assert (system.role, user.role, assistant.role, tool.role) == ("system", "user", "assistant", "tool")
    assert assistant.tool_calls is not None
    assert [(call.id, call.function.arguments) for call in assistant.tool_calls] == [
        ("a", '{"at": 1}'),
        ("b", '{"at": 2}'),
    ]
    assert (tool.tool_call_id, tool.content) == ("a", "here")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"text": {"format": {"type": "yaml"}}}, "invalid_value", "text"),
        ({"text": {"tone": "dry"}}, "unknown_parameter", "text.tone"),
        ({"reasoning": {"effort": "low", "sum": "x"}}, "unknown_parameter", "reasoning.sum"),
        ({"top_logprobs": 1}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "invalid_value", "top_logprobs"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "invalid_value", None),
        ({"input": [{"type": "function_call"}]}, "invalid_value", None),
        ({"max_tokens": 5}, "unknown_parameter", "max_tokens"),
    ],
)
def test_refusals(client: openai.OpenAI, fields: Any, code: str, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**FIELDS, input="Hi", extra_body=fields)
    assert (caught.value.code, caught.value.param) == (code, param)

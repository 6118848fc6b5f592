"""Forced tool calls: a grammar makes any model write them in its format, with valid arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from medusa_runtime import Grammar, MedusaService, RequestError
from medusa_runtime.constraints.grammar import GrammarWalk
from medusa_runtime.server.output.call_form import CallableTool, calls_grammar, closed_schema
from medusa_runtime.server.output.formats import TOOL_FORMATS
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings
from support.servers import LOOK, running
from support.tiny_tokenizer import make_tokenizer

SCHEMAS = {"look": LOOK, "go": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS: Any = [
    {"type": "function", "function": {"name": "look", "parameters": LOOK}},
    {"type": "function", "function": {"name": "go"}},
]
GO: Any = {"type": "function", "function": {"name": "go"}}
CHAT: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Where?"}], "tools": TOOLS, "max_tokens": 150}


@contextmanager
def served(service: MedusaService, form: str) -> Iterator[openai.OpenAI]:
    settings = Settings(bundle=Path("tiny"), model_names=("tiny",), tool_format=form)
    with (
        running(service, ServerMetrics("tiny"), settings) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60, _strict_response_validation=True) as client,
    ):
        yield client


@pytest.fixture(
    scope="module",
    params=["hermes", *(pytest.param(form, marks=pytest.mark.slow) for form in ("llama3", "mistral", "mistral-list"))],
)
def client(request: pytest.FixtureRequest, byte_service: MedusaService) -> Iterator[openai.OpenAI]:
    with served(byte_service, request.param) as client:
        yield client


def check(call: Any, *names: str) -> None:
    assert call.name in names
    jsonschema_rs.validate(SCHEMAS[call.name], json.loads(call.arguments))


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1, "seed": 1, "n": 3}], ids=["greedy", "seeds"])
@pytest.mark.parametrize(("choice", "names"), [("required", ["look", "go"]), (GO, ["go"])], ids=["any", "one"])
def test_an_answer_has_the_forced_call(
    client: openai.OpenAI, fields: dict[str, Any], choice: Any, names: list[str]
) -> None:
    asked = CHAT | fields | {"tool_choice": choice, "parallel_tool_calls": False}
    answer = client.chat.completions.create(**asked)
    expected = []
    for found in answer.choices:
        assert found.finish_reason == ("tool_calls" if choice == "required" else "stop")
        assert found.message.content is None
        (call,) = found.message.tool_calls or []
        assert call.type == "function"
        check(call.function, *names)
        expected.append((call.function.name, call.function.arguments))
    streamed = [["", ""] for _ in answer.choices]
    pieces = 0
    for chunk in client.chat.completions.create(**asked, stream=True):
        for part in chunk.choices:
            for delta in part.delta.tool_calls or []:
                assert delta.index == 0 and delta.function is not None
                assert (delta.id is None) == (delta.function.name is None)
                streamed[part.index][0] += delta.function.name or ""
                streamed[part.index][1] += delta.function.arguments or ""
                pieces += 1
    assert [tuple(call) for call in streamed] == expected
    assert pieces >= 2 * len(expected)


def test_several_calls_are_allowed_unless_they_may_not_be_parallel(client: openai.OpenAI) -> None:
    fields = CHAT | {"tool_choice": "required", "temperature": 1, "n": 3}
    for seed in range(3):
        for found in client.chat.completions.create(**fields, seed=seed).choices:
            for call in found.message.tool_calls or []:
                assert call.type == "function"
                if found.finish_reason != "length":
                    check(call.function, "look", "go")


def test_a_call_that_is_cut_has_the_arguments_so_far(client: openai.OpenAI) -> None:
    fields = CHAT | {"temperature": 0, "tool_choice": {"type": "function", "function": {"name": "look"}}}
    whole = client.chat.completions.create(**fields).choices[0].message.tool_calls
    (choice,) = client.chat.completions.create(**fields | {"max_tokens": 45}).choices
    assert choice.finish_reason == "length" and whole is not None and whole[0].type == "function"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.arguments
    assert whole[0].function.arguments.startswith(call.function.arguments)


def test_allowed_tools_leave_out_the_others(client: openai.OpenAI) -> None:
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [GO]}}
    fields = CHAT | {"temperature": 0, "tool_choice": choice, "parallel_tool_calls": False}
    (call,) = client.chat.completions.create(**fields).choices[0].message.tool_calls or []
    assert call.type == "function"
    check(call.function, "go")


def test_responses_stream_the_arguments_of_a_forced_call(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS]
    fields: Any = {"model": "tiny", "input": "Where?", "tools": tools, "temperature": 0, "max_output_tokens": 150}
    fields["tool_choice"] = {"type": "function", "name": "look"}
    (item,) = client.responses.create(**fields).output
    assert item.type == "function_call"
    check(item, "look")
    events = list(client.responses.create(**fields, stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 1 and "".join(deltas) == item.arguments
    last = events[-1]
    assert last.type == "response.completed"
    (streamed,) = last.response.output
    assert streamed.type == "function_call" and (streamed.name, streamed.arguments) == ("look", item.arguments)


def test_strict_tools_leave_text_free_and_bind_calls(client: openai.OpenAI) -> None:
    """A random model writes text; where its text is pushed to be a call, the call is valid."""
    strict: Any = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    for seed in range(2):
        fields = CHAT | {"tools": strict, "temperature": 1, "seed": seed, "max_tokens": 60}
        message = client.chat.completions.create(**fields).choices[0].message
        for call in message.tool_calls or []:
            assert call.type == "function"
            check(call.function, "look", "go")


ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_a_format_beside_tools_allows_calls_or_the_format(form: str) -> None:
    """The format of an answer governs its text, not its calls."""
    written, marks = TOOL_FORMATS[form].calls, TOOL_FORMATS[form].marks
    tools = [CallableTool("look", {}), CallableTool("go", None)]
    formats = {
        '{"ok": true}': Grammar.json_schema(ANSWER, one_line=True),
        "aab": Grammar.regex("a+b"),
        "yes}": Grammar.lark('start: word\nword: "yes}" | "no"'),
    }
    tokenizer = make_tokenizer(257).backend_tokenizer

    def accepts(grammar: Grammar, text: str) -> bool:
        walk = GrammarWalk(grammar, tokenizer.to_str(), 257, [0])
        try:
            walk.extend(tokenizer.encode(text, add_special_tokens=False).ids)
            walk.extend([0])
        except RequestError:
            return False
        return True

    opening = written.opening + written.before + written.begin
    assert set(marks) and opening
    for text, answer_format in formats.items():
        grammar = calls_grammar(written, tools, {}, may_answer=True, answer_format=answer_format)
        call = written.opening + written.before + written.head("look") + '{"x": 1}' + written.end + written.after
        assert accepts(grammar, call)
        assert accepts(grammar, written.content + text)
        assert not accepts(grammar, written.content + "text")
        assert not accepts(grammar, written.content + text + call)


@pytest.mark.parametrize("pushed", ["", "{o"], ids=["to nothing", "to the format"])
def test_an_answer_has_a_call_or_the_format_that_was_asked_for(client: openai.OpenAI, pushed: str) -> None:
    strict: Any = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    ids = make_tokenizer(257).encode(pushed, add_special_tokens=False)
    fields = CHAT | {"tools": strict, "temperature": 1, "n": 2, "parallel_tool_calls": False}
    fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": ANSWER}}
    fields["logit_bias"] = {str(token): 50 for token in ids}
    for seed in range(2):
        for found in client.chat.completions.create(**fields, seed=seed).choices:
            calls = found.message.tool_calls or []
            assert not (pushed and calls)
            for call in calls:
                assert call.type == "function"
                check(call.function, "look", "go")
            if not calls:
                jsonschema_rs.validate(ANSWER, json.loads(found.message.content or ""))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "any"}, "expected 'none', 'auto', 'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "names the function 'fly'"),
        ({"tool_choice": {"type": "function"}}, "expected 'none', 'auto', 'required'"),
        ({"tool_choice": "required", "tools": []}, "there are no tools"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{}]}}}, "no function"),
    ],
)
def test_other_choices_are_refused(client: openai.OpenAI, fields: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(**CHAT | fields)
    assert caught.value.param == "tool_choice"


def test_arguments_that_a_schema_does_not_name_are_left_out() -> None:
    """A small model would otherwise think them up without end."""
    inner = {"type": "object", "properties": {"x": {"type": "integer"}}}
    schema: dict[str, Any] = {"properties": {"a": inner, "b": {"items": inner}}, "required": ["a"]}
    closed = {**inner, "additionalProperties": False}
    expected = {"properties": {"a": closed, "b": {"items": closed}}, "required": ["a"], "additionalProperties": False}
    assert closed_schema(schema) == expected
    for more in (
        {"additionalProperties": {}},
        {"required": ["c"]},
        {"required": 5},
        {"required": [{}]},
        {"anyOf": [inner]},
        {"minProperties": 1},
    ):
        assert closed_schema({**inner, **more}) == {**inner, **more}


@pytest.mark.parametrize(
    "schema", [{"required": 5, "properties": {}}, {"properties": []}, {"type": "object", "$ref": 1}]
)
def test_schemas_that_are_none_are_refused(client: openai.OpenAI, schema: Any) -> None:
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": schema}}]
    with pytest.raises(openai.BadRequestError, match="The grammar can't be followed"):
        client.chat.completions.create(**CHAT | {"tools": tools, "tool_choice": "required"})

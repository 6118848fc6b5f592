"""Tool calls and reasoning, with OpenAI's client, over a stand-in for the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import openai
import pytest
from tokenizers import AddedToken

from medusa_runtime import MedusaService
from medusa_runtime.server.prometheus import ServerMetrics
from medusa_runtime.server.settings import Settings
from medusa_runtime.text.tokenizer import Tokenizer
from support.scripted_service import ScriptedService
from support.servers import running
from support.tiny_tokenizer import make_tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.arguments.at }}{% endfor %}{% endfor %}"
    "[assistant]{% if enable_thinking is defined and not enable_thinking %}off{% endif %}"
)
MARKS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]",),
    "harmony": ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>"),
}
TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
HI: Any = [{"role": "user", "content": "Where?"}]
CALL = '{"name": "look", "arguments": {"at": "sky"}}'


@contextmanager
def served(form: str, answer: str) -> Iterator[tuple[openai.OpenAI, ScriptedService]]:
    """A server whose model writes ``answer``, and a client. The marks of the format are special tokens."""
    backend = make_tokenizer(257).backend_tokenizer
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS[form]])
    signs = "{# " + " ".join(MARKS[form]) + " </think> #}"
    service = ScriptedService(Tokenizer(backend, chat_templates={"default": TEMPLATE + signs}), answer)
    settings = Settings(bundle=Path("scripted"))
    with (
        running(cast("MedusaService", service), ServerMetrics("scripted"), settings) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", _strict_response_validation=True) as client,
    ):
        yield client, service


ANSWERS = [
    ("hermes", f"<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{CALL}\n</tool_call>"),
    ("mistral", f"<think>Hm.</think>I look.[TOOL_CALLS][{CALL}]"),
    (
        "harmony",
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
            '<|start|>assistant<|channel|>commentary to=functions.look<|message|>{"at": "sky"}<|call|>'
        ),
    ),
]


@pytest.mark.parametrize(("form", "answer"), ANSWERS, ids=[form for form, _ in ANSWERS])
def test_calls_and_reasoning_are_apart_from_the_content(form: str, answer: str) -> None:
    with served(form, answer) as (client, service):
        fields: Any = {"model": "scripted", "messages": HI, "tools": TOOLS}
        (choice,) = client.chat.completions.create(**fields).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        assert choice.message.reasoning_content == "Hm."  # type: ignore[attr-defined]
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"at": "sky"})
        assert len(call.id) == (9 if form == "mistral" else 29)
        assert '"look"' in service.asked[0][0]

        texts = {"content": "", "reasoning_content": ""}
        calls, reasons = [], []
        for part in client.chat.completions.create(**fields, stream=True):
            delta = part.choices[0].delta
            for key in texts:
                texts[key] += getattr(delta, key, None) or ""
            calls += delta.tool_calls or []
            reasons.append(part.choices[0].finish_reason)
        assert texts == {"content": "I look.", "reasoning_content": "Hm."}
        assert {call.index for call in calls} == {0}
        assert [call.function.name for call in calls if call.function and call.function.name] == ["look"]
        assert "".join(call.function.arguments or "" for call in calls if call.function) == '{"at": "sky"}'
        assert reasons[-1] == "tool_calls" and {*reasons[:-1]} == {None}


def test_responses_have_an_item_for_each_part() -> None:
    form, answer = ANSWERS[0]
    tools: Any = [{"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}]
    with served(form, answer) as (client, _):
        response = client.responses.create(model="scripted", input="Where?", tools=tools)
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        assert response.output_text == "I look." and response.status == "completed"
        *_, last = client.responses.create(model="scripted", input="Where?", tools=tools, stream=True)
        assert last.type == "response.completed"
        assert [item.type for item in last.response.output] == ["reasoning", "message", "function_call"]
        item = last.response.output[-1]
        assert item.type == "function_call" and item.arguments == '{"at": "sky"}'
        # The items go back as input, with the function's output.
        back: Any = [{"role": "user", "content": "Where?"}, *(item.model_dump() for item in last.response.output)]
        back.append({"type": "function_call_output", "call_id": item.call_id, "output": "blue"})
        assert client.responses.create(model="scripted", input=back, tools=tools).output_text == "I look."


def test_an_answer_goes_back_with_the_tools_result() -> None:
    form, answer = ANSWERS[0]
    with served(form, answer) as (client, service):
        message = client.chat.completions.create(model="scripted", messages=HI, tools=TOOLS).choices[0].message
        (call,) = message.tool_calls or []
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "blue"}
        client.chat.completions.create(
            model="scripted",
            messages=[*HI, message, result],  # type: ignore[list-item]
            tools=TOOLS,
            extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        )
        assert service.asked[-1][0].endswith("[user]Where?[assistant]I look.sky[tool]blue[assistant]off")
        broken: Any = {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "["}}],
        }
        with pytest.raises(openai.BadRequestError, match="arguments that are no JSON object"):
            client.chat.completions.create(model="scripted", messages=[*HI, broken])


def test_without_tools_marks_are_no_calls() -> None:
    form, answer = ANSWERS[0]
    with served(form, answer) as (client, service):
        for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            (choice,) = client.chat.completions.create(model="scripted", messages=HI, extra_body=fields).choices
            assert choice.finish_reason == "stop" and choice.message.tool_calls is None
            assert '"look"' not in service.asked[-1][0]

"""Chats become the same text and tokens as in transformers, and malformed chats are refused."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from medusa_runtime.errors import BundleError, RequestError
from medusa_runtime.text.limits import (
    MAX_CHAT_VALUES,
    MAX_DEPTH,
    MAX_MESSAGES,
    MAX_TEXT_BYTES,
)
from medusa_runtime.text.tokenizer import Tokenizer
from support.template_texts import CHATML, LLAMA2, TOOLS
from support.tokenizer_folders import load, save
from support.tokenizer_kinds import (
    byte_fallback,
    byte_level,
)

MESSAGES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi! 😀 <b>&amp;</b>"}],
    [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "x\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "reasoning": "hm", "tool_calls": None},
        {"role": "user", "content": "three"},
    ],
]


WEATHER = {"type": "function", "function": {"name": "wetter", "parameters": {"größe": [1, 2.5, None, True]}}}


@pytest.fixture(scope="module", params=["chatml", "llama2", "tools"])
def chat_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    template = {"chatml": CHATML, "llama2": LLAMA2, "tools": TOOLS}[request.param]
    folder = save(tmp_path_factory.mktemp("chat"), byte_level(), chat_template=template)
    return load(folder), AutoTokenizer.from_pretrained(folder)


def same_chat(pair: tuple[Tokenizer, Any], messages: Any, **variables: Any) -> str:
    """The rendered chat. Checks that it and its ids equal those of transformers."""
    ours, theirs = pair
    prompted = {"add_generation_prompt": True} | variables
    text = ours.render_chat(messages, **variables)
    assert text == theirs.apply_chat_template(messages, tokenize=False, **prompted)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **prompted)
    assert ours.encode_chat(messages, **variables) == expected
    return text


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": [WEATHER], "documents": [], "enable_thinking": False},
        {"eos_token": "<other>", "pad_token": "P", "enable_thinking": np.bool_(True)},
    ],
)
def test_chats_equal_transformers(
    chat_pair: tuple[Tokenizer, Any], messages: list[dict[str, Any]], variables: dict[str, Any]
) -> None:
    same_chat(chat_pair, messages, **variables)


@pytest.fixture(scope="module")
def tools_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = save(tmp_path_factory.mktemp("tools"), byte_fallback(), chat_template=TOOLS)
    return load(folder), AutoTokenizer.from_pretrained(folder)


def test_loop_controls_and_tool_calls(tools_pair: tuple[Tokenizer, Any]) -> None:
    messages = [
        {"role": "skip", "content": "no"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "wetter", "arguments": {"ort": "Köln"}}]},
        {"role": "end"},
        {"role": "user", "content": "no"},
    ]
    text = same_chat(tools_pair, messages)
    assert "Köln" in text
    assert ">no" not in text
    assert "gone" in text


@dataclasses.dataclass
class Picture:
    path: str
    size: tuple[int, int]


class Name(enum.StrEnum):
    ADA = "Ada"


def test_rich_values_reach_the_template_as_plain_data(tools_pair: tuple[Tokenizer, Any]) -> None:
    values = [Picture("a.png", (1, 2)), Name.ADA, np.float32(0.5), np.zeros(2), {1: b"x"}, float("inf"), 10**30]
    same_chat(tools_pair, [{"role": "assistant", "tool_calls": values}])


def test_a_templates_own_error_message_is_kept(tmp_path: Path) -> None:
    ours = load(save(tmp_path, byte_level(), chat_template=LLAMA2))
    with pytest.raises(RequestError, match="roles must alternate"):
        ours.encode_chat([{"role": "assistant", "content": "first"}])
    with pytest.raises(RequestError, match="could not render"):
        ours.encode_chat([{"role": "user"}])


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def endless() -> list[Any]:
    """A list that contains itself."""
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ("hello", "list of objects"),
        ({"role": "user"}, "list of objects"),
        (None, "list of objects"),
        (["hello"], "Message 0 must be an object"),
        ([("user", "hello")], "Message 0 must be an object.* but got tuple"),
        ([{"role": "user", "content": 3}], "content of message 0 is 3"),
        ([{"role": "user", "content": b"hello"}], "content of message 0 is b'hello'"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "content of message 0 is {"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Message 0 holds the part {'type': 'text'}"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "type 'image_url'.* reads only text"),
        ([{"role": "user", "content": ["x", 3]}], "Message 0 holds the part 3"),
        ([{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1), "has 10,001 messages"),
        ([{"role": "user", "content": "x" * (MAX_TEXT_BYTES // 2 + 1)}] * 2, "more than 4,194,304 characters"),
        ([{"role": "user", "content": "x", "n": [0] * MAX_CHAT_VALUES}], "more than 200,000 values"),
        ([{"role": "user", "content": "x", "n": nested(MAX_DEPTH + 1)}], "more than 64 deep"),
        ([{"role": "user", "content": "x", "n": endless()}], "more than 64 deep"),
        ([{"role": "user", "content": "x"}, {"content": "y"}], "Message 1 has no role"),
        ([{"role": None, "content": "y"}], "has no role"),
        ([{"role": "user", "content": "\ud83d"}], "lone surrogate"),
    ],
)
def test_malformed_messages(tmp_path: Path, messages: Any, words: str) -> None:
    ours = Tokenizer(byte_level(), chat_templates={"default": CHATML})
    with pytest.raises(RequestError, match=words):
        ours.encode_chat(messages)


# Content in parts
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


# Supports both forms for users, and only text for other roles, as in Llama 3.2.
BOTH = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role != 'user' or m.content is string %}{{ m.content | trim }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<image>{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)


# Supports only parts. Of a string, nothing is printed.
PARTS_ONLY = "{% for m in messages %}[{{ m.role }}]{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"


# Supports both forms by a macro, so its loops don't show which forms it supports.
MACRO = (
    "{% macro show(c) %}{% if c is string %}{{ c }}{% elif c is iterable %}{% for p in c %}{{ p.text }};{% endfor %}"
    "{% endif %}{% endmacro %}{% for m in messages %}[{{ m.role }}]{{ show(m.content) }}{% endfor %}"
)


PRINTS_JSON = "{% for m in messages %}[{{ m.role }}]{{ m.content | tojson }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "user", "system"),
    [
        (CHATML, "one\ntwo", "one\ntwo"),
        (LLAMA2, "one\ntwo", "one\ntwo"),
        (TOOLS, "one\ntwo", "one\ntwo"),
        (BOTH, "onetwo", "one\ntwo"),
        (PARTS_ONLY, "onetwo", "onetwo"),
        (MACRO, "one;two;", "one;two;"),
        (PRINTS_JSON, '"one\\ntwo"', '"one\\ntwo"'),
    ],
)
@pytest.mark.parametrize("as_given", [PARTS, tuple(PARTS), ["one", {"text": "two"}], [{"type": "input_text", "text": t}
                                      for t in ("one", "two")]])  # fmt: skip
def test_text_parts_are_rendered_by_every_template(template: str, user: str, system: str, as_given: Any) -> None:
    ours = Tokenizer(byte_level(), chat_templates={"default": template}, named_tokens={"bos_token": "<s>"})
    text = ours.render_chat([{"role": "system", "content": as_given}, {"role": "user", "content": as_given}])
    if template is LLAMA2:
        assert "<<SYS>>\n" + system in text
    else:
        assert text.index(system) < text.rindex(user)
        assert text.replace(system, "").replace(user, "").count("one") == 0
    assert user in text and "type" not in text.replace("in type", "")


@pytest.mark.parametrize("template", [CHATML, LLAMA2, TOOLS, BOTH, PARTS_ONLY, MACRO])
def test_a_string_is_rendered_by_every_template(template: str) -> None:
    ours = Tokenizer(byte_level(), chat_templates={"default": template}, named_tokens={"bos_token": "<s>"})
    assert "hello" in ours.render_chat([{"role": "user", "content": "hello"}])


def test_parts_are_rendered_as_in_transformers(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level(), chat_template=MACRO)
    pair = load(folder), AutoTokenizer.from_pretrained(folder)
    assert same_chat(pair, [{"role": "user", "content": PARTS}]) == "[user]one;two;"


def test_malformed_variables() -> None:
    ours = Tokenizer(byte_level(), chat_templates={"default": CHATML})
    with pytest.raises(RequestError, match="tools must be a list"):
        ours.encode_chat(MESSAGES[0], tools=["wetter"])
    with pytest.raises(RequestError, match="continue_final_message"):
        ours.encode_chat(MESSAGES[0], continue_final_message=True)


def test_no_chat_template() -> None:
    with pytest.raises(RequestError, match="pass the prompt as text"):
        Tokenizer(byte_level()).encode_chat(MESSAGES[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ undefined.attribute }}",
        "{{ 1 / 0 }}",
    ],
)
def test_the_sandbox_refuses(template: str) -> None:
    with pytest.raises(RequestError, match="could not render"):
        Tokenizer(byte_level(), chat_templates={"default": template}).render_chat(MESSAGES[0])


def test_the_callers_messages_are_not_changed() -> None:
    messages = [{"role": "assistant", "content": "two", "reasoning": "hm", "tool_calls": None}]
    Tokenizer(byte_level(), chat_templates={"default": CHATML}).render_chat(messages)
    assert messages == [{"role": "assistant", "content": "two", "reasoning": "hm", "tool_calls": None}]


@pytest.mark.parametrize("layout", ["files", "list", "only named"])
def test_named_templates(tmp_path: Path, layout: str) -> None:
    named = {"default": CHATML, "tool_use": TOOLS, "rag": "R{{ messages[0].content }}"}
    if layout == "only named":
        del named["default"], named["tool_use"]
    save(tmp_path, byte_level(), chat_template=named)
    if layout == "list":
        for path in tmp_path.rglob("*.jinja"):
            path.unlink()
        path = tmp_path / "tokenizer_config.json"
        listed = [{"name": name, "template": template} for name, template in named.items()]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))
    pair = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert pair[0].chat_templates == named
    assert same_chat(pair, MESSAGES[0], chat_template="rag") == "R" + MESSAGES[0][0]["content"]
    if layout == "only named":
        with pytest.raises(RequestError, match=r"named 'default': choose one of \['rag'\]"):
            pair[0].render_chat(MESSAGES[0])
    else:
        same_chat(pair, MESSAGES[0])
        assert "wetter" in same_chat(pair, MESSAGES[0], tools=[WEATHER])


def test_template_in_the_configuration_ranks_below_its_file(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), chat_template="file")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "configuration"}))
    assert load(tmp_path).render_chat(MESSAGES[0]) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    assert load(tmp_path).render_chat(MESSAGES[0]) == "configuration"


def test_template_with_a_syntax_error() -> None:
    ours = Tokenizer(byte_level(), chat_templates={"default": "\n{% if %}"})
    with pytest.raises(BundleError, match="line 2"):
        ours.render_chat(MESSAGES[0])

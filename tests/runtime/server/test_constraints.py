"""Penalties, biases and formats of requests to the server."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from medusa_runtime import Constraints, Grammar, MedusaEngine
from medusa_runtime.server.constraints import constraints_of
from medusa_runtime.server.schema.chat import ChatRequest
from medusa_runtime.server.schema.responses import ResponsesRequest

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


def test_answers_are_those_of_the_engine_under_the_same_constraints(
    client: openai.OpenAI, engine: MedusaEngine
) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        temperature=0,
        max_tokens=20,
        presence_penalty=1.5,
        frequency_penalty=0.5,
        logit_bias={"40": 3, "22": -100},
        extra_body={"repetition_penalty": 1.2, "min_tokens": 10},
    )
    constraints = Constraints(
        presence_penalty=1.5,
        frequency_penalty=0.5,
        logit_bias={40: 3, 22: -100},
        repetition_penalty=1.2,
        min_new_tokens=10,
    )
    expected = engine.generate(MESSAGES, max_new_tokens=20, constraints=constraints)
    assert answer.choices[0].message.content == expected.text
    assert expected.text != engine.generate(MESSAGES, max_new_tokens=20).text


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar.json_object(one_line=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            Grammar.json_schema(SCHEMA, one_line=True),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar.json_schema(SCHEMA, one_line=True)),
        ({"structured_outputs": {"regex": "a+"}}, Grammar.regex("a+")),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, Grammar.lark('start: "yes" | "n\\"o"')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar.lark('start: "a"')),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Grammar.gbnf('root ::= "a"')),
    ],
)
def test_formats_become_grammars(fields: dict[str, Any], grammar: Grammar | None) -> None:
    constraints = constraints_of(ChatRequest.model_validate({"messages": MESSAGES, **fields}))
    assert (None if constraints is None else constraints.grammar) == grammar


def test_the_format_of_a_response_becomes_a_grammar() -> None:
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    constraints = constraints_of(ResponsesRequest.model_validate({"input": "Hi", "text": text}))
    assert constraints is not None
    assert constraints.grammar == Grammar.json_schema(SCHEMA, one_line=True)


def test_a_grammar_needs_an_end_token(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="a token that ends the text"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format={"type": "json_object"})


def test_words_of_a_choice_are_quoted() -> None:
    fields = {"structured_outputs": {"choice": ['"', "\\", "\n"]}}
    constraints = constraints_of(ChatRequest.model_validate({"messages": MESSAGES, **fields}))
    assert constraints is not None and constraints.grammar is not None
    assert constraints.grammar.source == r'start: "\"" | "\\" | "\n"'


@pytest.mark.parametrize("facts", [[], 5, {}, {"schema": []}])
def test_a_format_without_a_schema_is_refused(client: openai.OpenAI, facts: Any) -> None:
    form: Any = {"type": "json_schema", "json_schema": facts}
    with pytest.raises(openai.BadRequestError, match="needs a 'schema'"):
        client.chat.completions.create(model="tiny", messages=MESSAGES, response_format=form)

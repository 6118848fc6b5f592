"""Constraints: what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from medusa_runtime import Bundle, Constraints, Grammar, MedusaEngine, RequestError


@pytest.mark.parametrize(
    "given",
    [
        {"logit_bias": {-1: 1.0}}, {"logit_bias": {1: math.nan}}, {"logit_bias": {1: 2e3}}, {"logit_bias": {"a": 1.0}},
        {"logit_bias": [1, 2]}, {"banned_token_ids": "12"}, {"banned_token_ids": [-1]}, {"banned_token_ids": [1.5]},
        {"min_new_tokens": -1}, {"min_new_tokens": 1.5}, {"repetition_penalty": 0}, {"repetition_penalty": math.inf},
        {"repetition_penalty": "1"}, {"frequency_penalty": math.nan}, {"presence_penalty": True}, {"grammar": "a+"},
        {"logit_bias": {1: 10**400}}, {"repetition_penalty": 10**400},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(given))):
        Constraints(**given)


@pytest.mark.parametrize("schema", ["[1]", "{", '"x"', {"type": object()}])
def test_a_schema_that_is_no_object_is_refused(schema: Any) -> None:
    with pytest.raises(RequestError, match="The JSON schema"):
        Grammar.json_schema(schema)


def test_a_grammar_of_another_notation_is_refused() -> None:
    with pytest.raises(RequestError, match="GBNF"):
        Grammar.gbnf("root ::= (")
    with pytest.raises(RequestError, match="bytes"):
        Grammar("x" * 2**21)


def test_tokens_outside_the_vocabulary_are_refused(tiny_bundle: Bundle) -> None:
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        for constraints in (Constraints(logit_bias={101: 1.0}), Constraints(banned_token_ids=[500])):
            with pytest.raises(RequestError, match="token ids go up to 100"):
                engine.generate([1, 2, 3], constraints=constraints)
        with pytest.raises(RequestError, match="constraints is"):
            engine.generate([1, 2, 3], constraints={"presence_penalty": 1})  # type: ignore[typeddict-item]
        assert engine.generate([1, 2, 3], max_new_tokens=2, constraints=Constraints()).token_ids

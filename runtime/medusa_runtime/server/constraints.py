"""Translates the fields that constrain an answer: penalties, biases, a least number of tokens, and its format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from medusa_runtime.constraints.grammar import Grammar
from medusa_runtime.constraints.options import Constraints
from medusa_runtime.errors import RequestError
from medusa_runtime.server.errors import ApiError
from medusa_runtime.server.schema.base import Body

_MOST_BIAS = 100  # as in OpenAI's API


def constraints_of(body: Body) -> Constraints | None:
    """The constraints of a request; None if it demands nothing.

    Raises:
        ApiError: A field has a value that can't be served; the error names it.
        RequestError: A value is out of range.
    """
    given: dict[str, Any] = {
        "min_new_tokens": getattr(body, "min_tokens", None),
        "repetition_penalty": getattr(body, "repetition_penalty", None),
        "frequency_penalty": getattr(body, "frequency_penalty", None),
        "presence_penalty": getattr(body, "presence_penalty", None),
        "logit_bias": _logit_bias(getattr(body, "logit_bias", None)),
        "grammar": _grammar(body),
    }
    constraints = Constraints(**{name: value for name, value in given.items() if value is not None})
    return None if constraints.are_none else constraints


def _logit_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    for token, bias in given.items():
        if not re.fullmatch(r"\d{1,9}", token) or not -_MOST_BIAS <= bias <= _MOST_BIAS:
            message = f"logit_bias maps {token!r} to {bias}: expected a token id and a number from -100 to 100."
            raise ApiError(400, message, "invalid_value", param="logit_bias")
    return {int(token): bias for token, bias in given.items()}


def _grammar(body: Body) -> Grammar | None:
    """The grammar of the format that a request asks for: OpenAI's fields, and ``structured_outputs`` of vLLM."""
    text = getattr(body, "text", None)
    formats = {
        "response_format": getattr(body, "response_format", None),
        "text": None if text is None else text.format,
        "structured_outputs": getattr(body, "structured_outputs", None),
    }
    asked = {field: value for field, value in formats.items() if value is not None and value != {"type": "text"}}
    if not asked:
        return None
    if len(asked) > 1:
        raise ApiError(400, f"Give one of {' and '.join(asked)}, not both.", "invalid_value", param=max(asked))
    ((field, value),) = asked.items()
    try:
        return _structured(value) if field == "structured_outputs" else _of_format(value)
    except RequestError as error:
        raise ApiError(400, str(error), "invalid_value", param=field) from error


def _of_format(value: Any) -> Grammar:
    """The grammar of a ``response_format``, or of the ``format`` of a response's text."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "json_object":
        return Grammar.json_object(one_line=True)
    if kind == "json_schema":
        facts = value.get("json_schema", value)
        schema = facts.get("schema") if isinstance(facts, Mapping) else None
        if not isinstance(schema, Mapping):
            raise RequestError("A format of type 'json_schema' needs a 'schema', which is an object.")
        return Grammar.json_schema(schema, one_line=True)
    raise RequestError(f"The format has the type {kind!r}: expected 'text', 'json_object' or 'json_schema'.")


def _structured(value: Any) -> Grammar:
    """The grammar of ``structured_outputs``: an object with one of ``json``, ``regex``, ``choice`` and ``grammar``."""
    if not isinstance(value, Mapping) or len(value) != 1:
        raise RequestError("structured_outputs must have one of 'json', 'regex', 'choice' and 'grammar'.")
    ((kind, source),) = value.items()
    if kind == "json":
        return Grammar.json_schema(source, one_line=True)
    if kind == "choice" and isinstance(source, list) and source and all(isinstance(choice, str) for choice in source):
        return Grammar.lark("start: " + " | ".join(map(json.dumps, source)))
    if kind == "regex" and isinstance(source, str):
        return Grammar.regex(source)
    if kind == "grammar" and isinstance(source, str):
        return Grammar.gbnf(source) if "::=" in source else Grammar.lark(source)
    raise RequestError(f"structured_outputs has {kind!r} with a value that can't be used.")

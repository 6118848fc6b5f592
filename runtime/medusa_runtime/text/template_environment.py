"""The Jinja environment of chat templates, in a sandbox: the extensions, functions and filters that they expect."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace

from medusa_runtime.text.template_budget import render_budget
from medusa_runtime.text.template_sandbox import BoundedEnvironment

MAX_REFUSAL = 1000  # characters of a template's own error message, and of the layout of a date


class ChatRefusedError(Exception):
    """Raised by ``raise_exception`` in a template."""


@cache
def environment() -> BoundedEnvironment:
    """The environment. A sandbox, as templates are code that came with a model."""
    made = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _SafeNamespace,
    }
    made.charge_filters()
    return made


class _GenerationTag(Extension):
    """``{% generation %}``, which marks the assistant's text for training. Here it just renders its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """``dict(…)`` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _SafeNamespace(Namespace):
    """``namespace(…)`` without attributes that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named parameter: `namespace(self=…)` is allowed
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # short, since namespaces may hold each other
        return "<Namespace>"


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}")


def _raise_exception(message: object) -> None:
    raise ChatRefusedError(str(message)[:MAX_REFUSAL])


def _strftime_now(layout: str) -> str:
    if len(layout) > MAX_REFUSAL:
        raise ValueError("the layout of a date is too long")
    return datetime.now().strftime(layout)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's ``tojson`` filter, but without its escaping of HTML."""
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(value):  # piece by piece, since indentations and separators can be huge
        render_budget().spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)

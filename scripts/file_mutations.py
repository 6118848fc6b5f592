"""Damages files at random: JSON in its structure, templates in their tags, any file in its bytes or its type."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

RAW = "@raw-{}@"
# JSON texts, valid or not, that Python's own writer wouldn't write.
RAW_TEXTS = (
    "9" * 5000,
    "-" + "9" * 400,
    "1e999",
    "-1e400",
    "1" + "0" * 30,
    "0.1e-400",
    "NaN",
    "Infinity",
    "-0",
    "[" * 10_000 + "]" * 10_000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" * 500 + "]" * 500,
    '"\\ud800"',
    '"\\u0000"',
    "1 ",
    "01",
    "'x'",
    "tru",
    "[1,]",
    '"\n"',
    "",
    "[" + "[]," * 60_000 + "0]",
    "[" + "0," * 600_000 + "0]",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    255,
    256,
    10**9,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    -(2**63),
    0.0,
    -0.0,
    0.5,
    1.5,
    1e308,
    -1e308,
    5e-324,
    "",
    "0",
    "x",
    "x" * 300,
    "é" * 5000,
    "x" * 300_000,
    "\0",
    "\u2028",
    "..",
    "../x",
    "/etc/passwd",
    "a\\b",
    ".",
    "medusa.json",
    [],
    {},
    [[]],
    [None],
    [0] * 5000,
    {"": None},
    {"content": "x"},
    [{}],
    {"type": "Sequence"},
    "{{ x",
    "{% for %}",
    "float32",
    "int64",
    "1" * 20,
    "-1",
    *(RAW.format(i) for i in range(len(RAW_TEXTS))),
)
SNIPPETS = (
    "{%",
    "%}",
    "{{",
    "}}",
    "{#",
    "#}",
    "{%- ",
    " -%}",
    "{% for i in range(10**9) %}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if %}",
    "{% if x %}",
    "{% else %}",
    "{% endif %}",
    "{% set x = x ~ x %}",
    "{% set messages = messages + messages %}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'a' * 10**9 }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ messages }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ lipsum(10**9) }}",
    "{{ ''.__class__ }}",
    "{{ x.y.z }}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "{{ messages[0].content * 99999 }}",
    "{{ " + "(" * 300 + ")" * 300 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as y %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "{{ cycler()|list }}",
    "{% filter indent(10**9) %}",
    "{% autoescape true %}",
    "{{ dict(messages[0]) }}",
    "{{ namespace(a=1) }}",
    "\0",
    "\ud7ff",
    "é" * 1000,
)


def mutated_json(data: bytes, random: Random) -> bytes:
    """Damages some values, keys or elements of a JSON text."""
    try:
        root = [json.loads(data)]
    except ValueError:
        return mutated_bytes(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = list(_places(root))
        holder, key = random.choice(places[1:] or places)
        random.choice(_JSON_MUTATIONS)(holder, key, random)
        if not root:
            return b""
    try:
        text = json.dumps(root[0], ensure_ascii=random.random() < 0.5)
    except (RecursionError, ValueError):  # nested too deeply to be written, or contains itself
        return mutated_bytes(data, random)
    for i, raw in enumerate(RAW_TEXTS):
        text = text.replace(json.dumps(RAW.format(i)), raw)
    return text.encode("utf-8", "surrogatepass")


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Container and key of each value. Of huge containers, which earlier damage may have made, only the first ones."""
    found: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting and len(found) < 50_000:
        holder = waiting.pop()
        for key in list(holder)[:2000] if isinstance(holder, dict) else range(min(len(holder), 2000)):
            found.append((holder, key))
            if isinstance(holder[key], (list, dict)):
                waiting.append(holder[key])
    return found


def _replace(holder: Any, key: Any, random: Random) -> None:
    holder[key] = random.choice(VALUES)


def _remove(holder: Any, key: Any, _: Random) -> None:
    del holder[key]


def _wrap(holder: Any, key: Any, random: Random) -> None:
    value = holder[key]
    for _ in range(random.choice((1, 2, 200, 900))):
        value = [value]
    holder[key] = value


def _rename(holder: Any, key: Any, random: Random) -> None:
    name = random.choice([value for value in VALUES if isinstance(value, str)])
    if isinstance(holder, dict):
        holder[name] = holder.pop(key)
    else:
        holder.insert(key, name)


def _nudge(holder: Any, key: Any, random: Random) -> None:
    value = holder[key]
    if isinstance(value, (int, float)):
        holder[key] = random.choice((value + 1, value - 1, -value, value * 1000, float(value), str(value), [value]))
    elif isinstance(value, str):
        holder[key] = random.choice((value + value, value[:-1], value[::-1], value.upper(), [value], value * 1000))
    elif isinstance(value, list):
        holder[key] = random.choice((value * 2, value[:-1], value[::-1], value[:1] * 1000, dict(enumerate(value))))
    elif isinstance(value, dict):
        holder[key] = random.choice((list(value), list(value.values()), {**value, "more": value}))


def _swap(holder: Any, key: Any, random: Random) -> None:
    other = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]


_JSON_MUTATIONS: tuple[Callable[[Any, Any, Random], None], ...] = (
    _replace,
    _replace,
    _replace,
    _remove,
    _wrap,
    _rename,
    _nudge,
    _nudge,
    _swap,
)


def mutated_template(data: bytes, random: Random) -> bytes:
    """Removes, repeats or swaps tags of a template, or adds other tags."""
    parts = re.split(r"({%.*?%}|{{.*?}})", data.decode("utf-8", "replace"), flags=re.DOTALL)
    for _ in range(random.choice((1, 1, 2, 5))):
        place = random.randrange(len(parts))
        kind = random.randrange(5)
        if kind == 0:
            parts[place] = ""
        elif kind == 1:
            parts.insert(place, random.choice(parts))
        elif kind == 2:
            other = random.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        else:
            parts.insert(place, random.choice(SNIPPETS))
    return "".join(parts).encode("utf-8", "surrogatepass")


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """Changes, cuts off, inserts or repeats some of a file's bytes, or encodes them as UTF-16."""
    found = bytearray(data)
    place = random.randrange(len(found) + 1)
    kind = random.randrange(8)
    if kind <= 1:
        for _ in range(random.choice((1, 1, 8, 64))):
            if found:
                found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    elif kind == 2:
        del found[place:]
    elif kind == 3:
        del found[place : place + random.choice((1, 10, 1000))]
    elif kind == 4:
        found[place:place] = random.randbytes(random.choice((1, 4, 100)))
    elif kind == 5:
        found[place:place] = found[: random.choice((10, 1000, 100_000))]
    elif kind == 6:
        found[place : place + 8] = random.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\xef\xbb\xbf"))
    else:
        found = bytearray(data.decode("utf-8", "replace").encode("utf-16"))
    return bytes(found)


def replace_file(path: Path, random: Random) -> None:
    """Removes a file, or replaces it by another kind: a folder, a pipe, a link, a huge or an unreadable file."""
    others = [other for other in path.parents[1].rglob("*") if other.is_file() and other != path]
    kind = random.choice(("gone", "empty", "folder", "pipe", "circle", "nowhere", "outside", "huge", "other", "locked"))
    if kind == "other":
        content = random.choice(others).read_bytes()
        path.write_bytes(content)
    elif kind == "huge":
        with path.open("r+b") as file:
            file.truncate(random.choice((2**25, 2**33, 2**40)))
    elif kind == "locked":
        path.chmod(0)
    else:
        path.unlink()
        if kind == "empty":
            path.touch()
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind != "gone":
            path.symlink_to({"circle": path, "nowhere": "/nowhere/at/all", "outside": "/etc/hostname"}[kind])

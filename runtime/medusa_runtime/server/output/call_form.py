"""The form of tool calls in a format, the grammar of such calls, and the parser of answers that follow it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medusa_runtime.constraints.grammar import ONE_LINE, Grammar
from medusa_runtime.server.output.parts import Arguments, Call, Part

# Calls in one answer. A small model may repeat a call without end.
_MOST_CALLS = 8
# Keys of a JSON schema that may allow properties that the schema does not name.
_FURTHER = frozenset(
    [
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "propertyNames",
        "minProperties",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "$ref",
        "$dynamicRef",
        "allOf",
        "anyOf",
        "oneOf",
        "not",
        "if",
    ]
)
# A string, a separator, or any other character of a JSON text in one line.
_JSON_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[:,] |.')
_NO_ARGUMENTS: dict[str, Any] = {"properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class CallForm:
    """The texts around the names and arguments of calls, in the order in which they come.

    Attributes:
        opening: The mark before the first call; empty if there is none. Then an answer that begins with ``{`` has
            calls.
        before: The text between the mark and the first call.
        begin: The text of a call before the name.
        middle: The text between a name and its arguments.
        end: The text behind the arguments.
        between: The text between two calls; None if an answer has one call at most.
        after: The text behind the last call.
        quotes: True if the name is the inside of a JSON string.
        content: The text before an answer without calls.
    """

    begin: str
    middle: str
    end: str = ""
    opening: str = ""
    before: str = ""
    between: str | None = None
    after: str = ""
    quotes: bool = True
    content: str = ""

    def head(self, name: str) -> str:
        """The text of a call up to its arguments."""
        return self.begin + (json.dumps(name, ensure_ascii=False)[1:-1] if self.quotes else name) + self.middle


@dataclass(frozen=True)
class ReasoningForm:
    """The texts around the reasoning that comes before calls.

    Attributes:
        begin: The text before it; empty if the prompt ends inside of it.
        end: The mark behind it.
        gap: The text between the mark and what follows.
    """

    begin: str
    end: str
    gap: str


@dataclass(frozen=True)
class CallableTool:
    """A function that may be called.

    Attributes:
        name: Its name.
        schema: The JSON schema of its arguments; None if it takes none.
    """

    name: str
    schema: Mapping[str, Any] | None


def calls_grammar(
    form: CallForm,
    tools: Sequence[CallableTool],
    marks: Mapping[str, int],
    *,
    reasoning: ReasoningForm | None = None,
    one_call: bool = False,
    may_answer: bool = False,
    answer_format: Grammar | None = None,
) -> Grammar:
    """The grammar of an answer that calls functions.

    Args:
        form: How calls are written.
        tools: The functions that may be called.
        marks: Ids of the special tokens, by their text.
        reasoning: How reasoning before the calls is written; None if there is none.
        one_call: If True, there is one call at most.
        may_answer: If True, the answer may be text without calls, or have text before the calls.
        answer_format: The format of an answer without calls; None if its text is free. With a format, no text comes
            before the calls.

    Raises:
        RequestError: A schema is no JSON object.
    """

    def ending_with(mark: str) -> str:
        """A rule's name and body: any text up to a mark."""
        return f": TEXT {_text(mark, marks)}" if mark in marks else f"[lazy]: TEXT {_text(mark, marks)}"

    rules = ["TEXT: /(.|\\n)*/", "call: " + " | ".join(f"call_{number}" for number in range(len(tools)))]
    for number, tool in enumerate(tools):
        schema = _NO_ARGUMENTS if tool.schema is None else closed_schema(tool.schema)
        schema = {**schema, "type": "object", **ONE_LINE}
        head, end = _text(form.head(tool.name), marks), _text(form.end, marks)
        if answer_format is not None and not form.opening:
            head = _json_text(form.head(tool.name))
        rules.append(f"call_{number}: {head} %json {json.dumps(schema)} {end}")
    further = "" if one_call or form.between is None else f"({_text(form.between, marks)} call){{0,{_MOST_CALLS - 1}}}"
    rules.append(f"calls: {_text(form.before, marks)} call {further} {_text(form.after, marks)}")
    answer = f"{_text(form.opening, marks)} calls"
    if may_answer and answer_format is not None:
        answer += f" | {_text(form.content, marks)} {answer_format.expression}"
    elif may_answer and form.content:
        answer += f" | {_text(form.content, marks)} TEXT"
    elif may_answer and form.opening:
        rules.append(f"preface{ending_with(form.opening)}")
        answer = "preface calls | TEXT"
    elif may_answer:
        answer += r' | "" | /[^{\s](.|\n)*/'
    rules.append(f"answer: {answer}")
    start = "answer"
    if reasoning is not None:
        rules.append(f"thought{ending_with(reasoning.end)}")
        thought = f"{_text(reasoning.begin, marks)} thought {_text(reasoning.gap, marks)}"
        start = f"({thought})? answer" if reasoning.begin else f"{thought} answer"
    return Grammar.lark("\n".join([f"start: {start}", *rules]))


def closed_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema whose objects have no properties besides those it names, where it says nothing of others.

    It allows less than the schema. A small model may otherwise think up properties without end.
    """
    found = dict(schema)
    properties, items = schema.get("properties"), schema.get("items")
    if isinstance(properties, Mapping):
        found["properties"] = {
            name: closed_schema(part) if isinstance(part, Mapping) else part for name, part in properties.items()
        }
        required = schema.get("required", ())
        is_known = isinstance(required, Sequence) and all(name in [*properties] for name in required)
        if is_known and not _FURTHER & schema.keys():
            found["additionalProperties"] = False
    if isinstance(items, Mapping):
        found["items"] = closed_schema(items)
    return found


def _text(text: str, marks: Mapping[str, int]) -> str:
    """A text in Lark's notation. Special tokens are named by their ids."""
    pieces = re.split(f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})", text) if marks else [text]
    return " ".join(
        f"<[{marks[piece]}]>" if piece in marks else json.dumps(piece, ensure_ascii=False) for piece in pieces if piece
    )


def _json_text(text: str) -> str:
    """The start of a JSON object in Lark's notation, in the pieces that the grammar of a schema has.

    llguidance prefers a longer piece, and does not go back: ``{"name": "`` in one piece would allow no other object.
    """
    return " ".join(json.dumps(piece, ensure_ascii=False) for piece in _JSON_PIECE.findall(text))


class ForcedCallParser:
    """Reads an answer that follows the grammar of forced calls. Arguments are given out as they come.

    Args:
        form: How calls are written.
        names: Names of the functions.
    """

    def __init__(self, form: CallForm, names: Collection[str]) -> None:
        self._heads = {form.opening + form.before + form.head(name): name for name in names}
        self._further = {form.end + (form.between or "") + form.head(name): name for name in names}
        self._held = ""
        self._arguments: _ObjectEnd | None = None

    def feed(self, text: str) -> Iterator[Part]:
        self._held += text
        while self._held:
            if self._arguments is None:
                head = next((head for head in self._heads if self._held.startswith(head)), None)
                if head is None:
                    return
                yield Call(self._heads[head], "")
                self._held = self._held[len(head) :]
                self._heads, self._arguments = self._further, _ObjectEnd()
                continue
            size = self._arguments.find(self._held)
            yield Arguments(self._held[:size])
            self._held = self._held[size:]
            if self._arguments.depth:
                return
            self._arguments = None

    def finish(self) -> Iterator[Part]:
        return iter(())


class _ObjectEnd:
    """Finds the end of a JSON object in text that comes in pieces.

    Attributes:
        depth: Objects and lists that are open.
    """

    def __init__(self) -> None:
        self.depth = 0
        self._in_string = self._is_escaped = False

    def find(self, text: str) -> int:
        """The number of characters of a piece that belong to the object."""
        for place, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if not self.depth:
                    return place + 1
            else:
                self._in_string = character == '"'
        return len(text)

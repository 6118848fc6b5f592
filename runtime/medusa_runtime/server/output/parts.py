"""The parts of an answer, and the parsers' interface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that the model wrote to itself."""

    text: str


@dataclass(frozen=True)
class Call:
    """A tool call, or the beginning of one.

    Attributes:
        name: Name of the function.
        arguments: Its arguments in JSON. ``Arguments`` parts behind it have more of them.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class Arguments:
    """More of the arguments of the last call."""

    text: str


Part = Content | Reasoning | Call | Arguments


class OutputParser(Protocol):
    """Divides the text of one answer into parts. The parts don't depend on how the text is divided into pieces."""

    def feed(self, text: str) -> Iterator[Part]:
        """Takes the next text. Yields the parts that are certain."""
        ...

    def finish(self) -> Iterator[Part]:
        """Yields the parts that were held back, at the end of the text."""
        ...


class PlainParser:
    """All text is content."""

    def feed(self, text: str) -> Iterator[Part]:
        if text:
            yield Content(text)

    def finish(self) -> Iterator[Part]:
        return iter(())


class Text:
    """Text that comes in pieces and is searched for marks. It holds back what may be the start of a mark."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> None:
        """Adds text."""
        self._held += text

    def until(self, *marks: str) -> tuple[str, str | None]:
        """Takes the text up to the first of the marks, and the mark.

        Returns:
            The text before the mark, and the mark. If there is none yet, the text that is certainly before any mark,
            and None.
        """
        found = [(place, -len(mark), mark) for mark in marks if (place := self._held.find(mark)) >= 0]
        if found:
            place, _, mark = min(found)
            text, self._held = self._held[:place], self._held[place + len(mark) :]
            return text, mark
        longest = min(len(self._held), max(map(len, marks)) - 1)
        keep = next((size for size in range(longest, 0, -1) if self._ends_in_start(size, marks)), 0)
        certain = len(self._held) - keep
        text, self._held = self._held[:certain], self._held[certain:]
        return text, None

    def rest(self) -> str:
        """Takes all text."""
        text, self._held = self._held, ""
        return text

    def _ends_in_start(self, size: int, marks: tuple[str, ...]) -> bool:
        return any(mark.startswith(self._held[-size:]) for mark in marks)


def call_of(value: object) -> Call | None:
    """The call that a JSON object of a model stands for; None if it is no call.

    Args:
        value: Such as ``{"name": "look", "arguments": {"place": "sky"}}``. ``parameters`` is read like ``arguments``.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments: Any = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def parsed(text: str) -> object:
    """A text's JSON value; None if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None

"""Tool calls of Llama 3: ``{"name": …, "parameters": {…}}`` in place of text, or behind ``<|python_tag|>``."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from medusa_runtime.server.output.call_form import CallForm
from medusa_runtime.server.output.parts import Content, Part, Text, call_of

TAG = "<|python_tag|>"
MARKS = (TAG,)
CALLS = CallForm(begin='{"name": "', middle='", "parameters": ', end="}", between="; ")


class Llama3Parser:
    """Finds tool calls in JSON, separated by semicolons, at the start of the text or behind the tag.

    Args:
        names: Names of the functions that may be called. Other JSON is content.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._text = Text()
        self._calls: str | None = ""  # text that may be calls; None in content
        self._tag = ""

    def feed(self, text: str) -> Iterator[Part]:
        self._text.push(text)
        while True:
            found, mark = self._text.until(TAG)
            if self._calls is not None:
                self._calls += found
                if self._calls.strip() and not self._tag and not self._calls.lstrip().startswith("{"):
                    found, self._calls = self._calls, None
            if self._calls is None and found:
                yield Content(found)
            if mark is None:
                return
            if self._calls is not None:
                yield from self._found()
            self._calls, self._tag = "", TAG

    def finish(self) -> Iterator[Part]:
        rest = self._text.rest()
        if self._calls is None:
            if rest:
                yield Content(rest)
        else:
            self._calls += rest
            yield from self._found()

    def _found(self) -> Iterator[Part]:
        """The calls in the text that was held; content from the first thing on that is no call."""
        text = (self._calls or "").lstrip()
        whole, self._calls = self._tag + (self._calls or ""), None
        first = True
        while text:
            try:
                value, end = json.JSONDecoder().raw_decode(text)
            except (ValueError, RecursionError):
                value, end = None, 0
            call = call_of(value)
            if call is None or call.name not in self._names:
                yield Content(whole if first else text)
                return
            yield call
            first = False
            text = text[end:].lstrip("; \n")

"""Tool calls of Hermes and Qwen: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``."""

from __future__ import annotations

from collections.abc import Iterator

from medusa_runtime.server.output.call_form import CallForm
from medusa_runtime.server.output.parts import Content, Part, Text, call_of, parsed

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKS = (OPEN, CLOSE)
CALLS = CallForm(
    opening=OPEN,
    begin='\n{"name": "',
    middle='", "arguments": ',
    end="}\n" + CLOSE,
    between="\n" + OPEN,
)


class HermesParser:
    """Finds tool calls between marks. A call that is no JSON is content."""

    def __init__(self) -> None:
        self._text = Text()
        self._call: str | None = None  # the text of the call so far, inside the marks

    def feed(self, text: str) -> Iterator[Part]:
        self._text.push(text)
        while True:
            found, mark = self._text.until(OPEN if self._call is None else CLOSE)
            if self._call is None:
                if found:
                    yield Content(found)
                self._call = None if mark is None else ""
            else:
                self._call += found
                if mark is not None:
                    yield self._part(mark)
            if mark is None:
                return

    def finish(self) -> Iterator[Part]:
        rest = self._text.rest()
        if self._call is not None:
            self._call += rest
            yield self._part("")
        elif rest:
            yield Content(rest)

    def _part(self, close: str) -> Part:
        text, self._call = self._call or "", None
        return call_of(parsed(text)) or Content(OPEN + text + close)

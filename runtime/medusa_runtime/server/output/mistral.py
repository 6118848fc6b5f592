"""Tool calls of Mistral: ``[TOOL_CALLS][{"name": …, "arguments": {…}}]``, or ``[TOOL_CALLS]name[ARGS]{…}``."""

from __future__ import annotations

from collections.abc import Iterator

from medusa_runtime.server.output.call_form import CallForm
from medusa_runtime.server.output.parts import Call, Content, Part, Text, call_of, parsed

OPEN, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
MARKS = (OPEN, ARGUMENTS, CALL_ID)
LIST_CALLS = CallForm(
    opening=OPEN, before="[", begin='{"name": "', middle='", "arguments": ', end="}", between=", ", after="]"
)
CALLS = CallForm(opening=OPEN, begin="", middle=ARGUMENTS, between=OPEN, quotes=False)


class MistralParser:
    """Finds tool calls behind the mark, up to the next mark or the end. Other text is content."""

    def __init__(self) -> None:
        self._text = Text()
        self._calls: str | None = None  # the text behind the mark so far

    def feed(self, text: str) -> Iterator[Part]:
        self._text.push(text)
        while True:
            found, mark = self._text.until(OPEN)
            if self._calls is not None:
                self._calls += found
            elif found:
                yield Content(found)
            if mark is None:
                return
            yield from self._found()
            self._calls = ""

    def finish(self) -> Iterator[Part]:
        rest = self._text.rest()
        if self._calls is not None:
            self._calls += rest
        elif rest:
            yield Content(rest)
        yield from self._found()

    def _found(self) -> Iterator[Part]:
        text, self._calls = self._calls, None
        if text is None:
            return
        name, mark, arguments = text.partition(ARGUMENTS)
        if mark and isinstance(parsed(arguments), dict):
            yield Call(name.partition(CALL_ID)[0].strip(), arguments.strip())
            return
        values = parsed(text)
        calls = [call_of(value) for value in (values if isinstance(values, list) else [values])]
        complete = [call for call in calls if call is not None]
        yield from complete if len(complete) == len(calls) and calls else (Content(OPEN + text),)

"""The channels of gpt-oss: ``<|channel|>analysis<|message|>…<|end|>``, then ``<|start|>assistant<|channel|>final…``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from medusa_runtime.server.output.call_form import CallForm, ReasoningForm
from medusa_runtime.server.output.parts import Arguments, Call, Content, Part, Reasoning, Text

CHANNEL, MESSAGE, START, CONSTRAIN = "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = (CHANNEL, MESSAGE, START, CONSTRAIN, *_ENDS)
CALLS = CallForm(
    opening=CHANNEL,
    begin="commentary to=functions.",
    middle=f" {CONSTRAIN}json{MESSAGE}",
    quotes=False,
    content=f"{CHANNEL}final{MESSAGE}",
)
REASONING = ReasoningForm(begin=f"{CHANNEL}analysis{MESSAGE}", end="<|end|>", gap=f"{START}assistant")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


class HarmonyParser:
    """Messages to functions are tool calls, the channel ``analysis`` is reasoning, and all others are content."""

    def __init__(self) -> None:
        self._text = Text()
        self._header: str | None = ""  # the header of the message so far; None in its body
        self._recipient: str | None = None
        self._is_reasoning = False

    def feed(self, text: str) -> Iterator[Part]:
        self._text.push(text)
        while True:
            if self._header is not None:
                found, mark = self._text.until(MESSAGE)
                self._header += found
                if mark is not None:
                    yield from self._begin()
            else:
                found, mark = self._text.until(*_ENDS, START)
                yield from self._body(found)
                if mark is not None:
                    self._end()
            if mark is None:
                return

    def finish(self) -> Iterator[Part]:
        rest = self._text.rest()
        if self._header is None:
            yield from self._body(rest)
            return
        text = self._header + rest
        if text and CHANNEL not in text and START not in text:  # an answer without channels
            yield Content(text)

    def _begin(self) -> Iterator[Part]:
        header = self._header or ""
        recipient = _RECIPIENT.search(header)
        self._recipient = recipient[1] if recipient else None
        self._is_reasoning = header.partition(CHANNEL)[2].lstrip().startswith("analysis")
        self._header = None
        if self._recipient is not None:
            yield Call(self._recipient, "")

    def _body(self, text: str) -> Iterator[Part]:
        if not text:
            return
        if self._recipient is not None:
            yield Arguments(text)
        else:
            yield Reasoning(text) if self._is_reasoning else Content(text)

    def _end(self) -> None:
        self._header, self._recipient = "", None

"""Reasoning between ``<think>`` and ``</think>``, before the content."""

from __future__ import annotations

from collections.abc import Iterator

from medusa_runtime.server.output.parts import Arguments, Content, OutputParser, Part, Reasoning, Text

OPEN, CLOSE = "<think>", "</think>"
MARKS = (OPEN, CLOSE)


def is_open(prompt: str) -> bool:
    """True if a prompt ends inside of reasoning."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningParser:
    """Separates reasoning at the start of a text, and leaves the rest to another parser.

    Line breaks beside the marks belong to neither part.

    Args:
        inner: The parser of the text behind the reasoning.
        is_open: True if the prompt ends inside of the reasoning.
    """

    def __init__(self, inner: OutputParser, *, is_open: bool) -> None:
        self._inner = inner
        self._text = Text()
        self._state = "reasoning" if is_open else "start"
        self._before = ""  # white space at the start, or line breaks that may be beside a mark
        self._has_reasoned = False

    def feed(self, text: str) -> Iterator[Part]:
        self._text.push(text)
        if self._state == "start":
            self._start()
        if self._state == "reasoning":
            found, mark = self._text.until(CLOSE)
            yield from self._reasoned(found)
            if mark is not None:
                self._state, self._before = "behind", ""
        if self._state == "behind":
            self._text.push(self._text.rest().lstrip("\n"))
            if (rest := self._text.rest()) != "":
                self._state = "content"
                yield from self._inner.feed(rest)
        elif self._state == "content":
            yield from self._inner.feed(self._text.rest())

    def finish(self) -> Iterator[Part]:
        if self._state == "reasoning":
            yield from self._reasoned(self._text.rest())
        else:
            yield from self._inner.feed(self._before + self._text.rest())
        yield from self._inner.finish()

    def _start(self) -> None:
        """Finds out whether the text begins with the mark, maybe behind white space."""
        text = self._text.rest()
        begun = text.lstrip()
        if begun.startswith(OPEN):
            self._state = "reasoning"
            self._text.push(begun[len(OPEN) :])
        else:
            if not OPEN.startswith(begun):
                self._state = "content"
            self._text.push(text)

    def _reasoned(self, text: str) -> Iterator[Part]:
        """Gives reasoning out, without the line breaks at its start and end."""
        text = self._before + text if self._has_reasoned else (self._before + text).lstrip("\n")
        bare = text.rstrip("\n")
        self._before = text[len(bare) :]
        if bare:
            self._has_reasoned = True
            yield Reasoning(bare)


class Trimmer:
    """Leaves out the white space of the content that is beside tool calls, and empty parts.

    Args:
        inner: The parser whose parts are trimmed.
        one_call: If True, all calls behind the first are left out.
    """

    def __init__(self, inner: OutputParser, *, one_call: bool = False) -> None:
        self._inner = inner
        self._one_call = one_call
        self._space = ""
        self._calls = 0

    def feed(self, text: str) -> Iterator[Part]:
        return self._trimmed(self._inner.feed(text))

    def finish(self) -> Iterator[Part]:
        yield from self._trimmed(self._inner.finish())
        if self._space and not self._calls:
            yield Content(self._space)

    def _trimmed(self, parts: Iterator[Part]) -> Iterator[Part]:
        for part in parts:
            if isinstance(part, Content):
                text = self._space + part.text
                bare = text.rstrip()
                self._space = text[len(bare) :]
                if bare:
                    yield Content(bare.lstrip() if self._calls else bare)
                continue
            if not isinstance(part, Reasoning):
                self._space = ""
                self._calls += not isinstance(part, Arguments)
                if self._one_call and self._calls > 1:
                    continue
            yield part

"""The items of a response, and the events that stream them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from medusa_runtime.server.generation import Step
from medusa_runtime.server.ids import random_hex
from medusa_runtime.server.output.parts import Arguments, Call, Content, Part, Reasoning
from medusa_runtime.server.schema.answers import TokenLogprob

Kind = Literal["message", "reasoning", "function_call"]

_KINDS: dict[type, Kind] = {
    Content: "message",
    Reasoning: "reasoning",
    Call: "function_call",
    Arguments: "function_call",
}
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


@dataclass
class Item:
    """An item of a response: a message, reasoning, or a function call.

    Attributes:
        kind: Its kind.
        text: Its text so far; of a function call, the arguments.
        name: Name of the function.
        id: Its identifier.
        call_id: Identifier of the function call.
        logprobs: Log probabilities of the tokens of a message, if they were asked for.
    """

    kind: Kind
    text: str = ""
    name: str = ""
    id: str = ""
    call_id: str = field(default_factory=lambda: f"call_{random_hex(24)}")
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = self.id or f"{_PREFIXES[self.kind]}_{random_hex(48)}"

    @property
    def part(self) -> dict[str, Any]:
        """The part that holds its text."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": [*self.logprobs]}

    def answer(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        """The item as a JSON object.

        Args:
            status: ``in_progress``, ``completed`` or ``incomplete``.
            is_empty: If True, its text is left out.
        """
        if self.kind == "function_call":
            arguments = "" if is_empty else self.text
            return {
                "type": self.kind,
                "id": self.id,
                "call_id": self.call_id,
                "name": self.name,
                "arguments": arguments,
                "status": status,
            }
        content = [] if is_empty else [self.part]
        if self.kind == "reasoning":
            return {"type": self.kind, "id": self.id, "summary": [], "content": content, "status": status}
        return {"type": self.kind, "id": self.id, "role": "assistant", "content": content, "status": status}


def items_of(steps: Iterable[Step], logprobs: Sequence[TokenLogprob]) -> list[Item]:
    """The items of a complete answer. An answer without text has an empty message. Arguments as for ``add``."""
    events = ResponseEvents()
    for _ in (*events.add(steps, logprobs), *events.finish()):
        pass
    return events.items


class ResponseEvents:
    """Makes the events of a response, in order.

    Attributes:
        items: The items so far.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._number = 0
        self._open = False
        self._unplaced: list[TokenLogprob] = []  # of tokens whose text has not come

    def numbered(self, kind: str, **facts: object) -> dict[str, object]:
        """An event with the next number."""
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **facts}

    def add(self, steps: Iterable[Step], logprobs: Sequence[TokenLogprob]) -> Iterator[dict[str, object]]:
        """The events for the parts that steps add to the answer.

        Log probabilities of a step go with the last text of a message in it, those of a step without any text with what
        comes next. A step of reasoning or calls alone has none.

        Args:
            steps: The steps.
            logprobs: Log probabilities of all their tokens; empty if they were not asked for.
        """
        place = 0
        for step in steps:
            self._unplaced += logprobs[place : place + step.count]
            place += step.count
            last = max((index for index, part in enumerate(step.parts) if isinstance(part, Content)), default=None)
            for index, part in enumerate(step.parts):
                yield from self._add_part(part, self._take_unplaced() if index == last else [])
            if step.parts:
                self._unplaced = []

    def _take_unplaced(self) -> list[TokenLogprob]:
        taken, self._unplaced = self._unplaced, []
        return taken

    def _add_part(self, part: Part, logprobs: list[TokenLogprob]) -> Iterator[dict[str, object]]:
        kind = _KINDS[type(part)]
        if isinstance(part, Call):
            yield from self._end()
            yield from self._begin(Item(kind, part.arguments, part.name))
            if part.arguments:
                yield self._of_item("response.function_call_arguments.delta", delta=part.arguments)
            return
        if not self._open or self.items[-1].kind != kind:
            yield from self._end()
            yield from self._begin(Item(kind))
        self.items[-1].text += part.text
        if kind == "function_call":
            yield self._of_item("response.function_call_arguments.delta", delta=part.text)
            return
        facts = {"content_index": 0, "delta": part.text}
        if kind == "message":
            self.items[-1].logprobs += logprobs
            yield self._of_item("response.output_text.delta", **facts, logprobs=logprobs)
        else:
            yield self._of_item("response.reasoning_text.delta", **facts)

    def finish(self) -> Iterator[dict[str, object]]:
        """The events at the end of the answer."""
        if not self.items:
            yield from self._begin(Item("message"))
        if self.items[-1].kind == "message":  # the token that ends the answer, say
            self.items[-1].logprobs += self._take_unplaced()
        yield from self._end()

    def _of_item(self, kind: str, **facts: object) -> dict[str, object]:
        return self.numbered(kind, item_id=self.items[-1].id, output_index=len(self.items) - 1, **facts)

    def _begin(self, item: Item) -> Iterator[dict[str, object]]:
        self.items.append(item)
        self._open = True
        index = len(self.items) - 1
        begun = item.answer("in_progress", is_empty=True)
        yield self.numbered("response.output_item.added", output_index=index, item=begun)
        if item.kind != "function_call":
            yield self._of_item("response.content_part.added", content_index=0, part=item.part)

    def _end(self) -> Iterator[dict[str, object]]:
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        if item.kind == "function_call":
            yield self._of_item("response.function_call_arguments.done", name=item.name, arguments=item.text)
        else:
            kind = "output_text" if item.kind == "message" else "reasoning_text"
            more: dict[str, object] = {"logprobs": [*item.logprobs]} if item.kind == "message" else {}
            yield self._of_item(f"response.{kind}.done", content_index=0, text=item.text, **more)
            yield self._of_item("response.content_part.done", content_index=0, part=item.part)
        yield self.numbered(
            "response.output_item.done", output_index=len(self.items) - 1, item=item.answer("completed")
        )

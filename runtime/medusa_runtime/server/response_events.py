"""The items of a response, and the events that stream them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from medusa_runtime.server.ids import random_hex
from medusa_runtime.server.output.parts import Arguments, Call, Content, Part, Reasoning

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
    """

    kind: Kind
    text: str = ""
    name: str = ""
    id: str = ""
    call_id: str = field(default_factory=lambda: f"call_{random_hex(24)}")

    def __post_init__(self) -> None:
        self.id = self.id or f"{_PREFIXES[self.kind]}_{random_hex(48)}"

    @property
    def part(self) -> dict[str, Any]:
        """The part that holds its text."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

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


def items_of(parts: Iterable[Part]) -> list[Item]:
    """The items of a complete answer. An answer without text has an empty message."""
    items: list[Item] = []
    for part in parts:
        kind = _KINDS[type(part)]
        if isinstance(part, Call):
            items.append(Item(kind, part.arguments, part.name))
        elif items and items[-1].kind == kind:
            items[-1].text += part.text
        else:
            items.append(Item(kind, part.text))
    return items or [Item("message")]


class ResponseEvents:
    """Makes the events of a response, in order.

    Attributes:
        items: The items so far.
    """

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._number = 0
        self._open = False

    def numbered(self, kind: str, **facts: object) -> dict[str, object]:
        """An event with the next number."""
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **facts}

    def add(self, part: Part) -> Iterator[dict[str, object]]:
        """The events of a part of the answer."""
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
            yield self._of_item("response.output_text.delta", **facts, logprobs=[])
        else:
            yield self._of_item("response.reasoning_text.delta", **facts)

    def finish(self) -> Iterator[dict[str, object]]:
        """The events at the end of the answer."""
        if not self.items:
            yield from self._begin(Item("message"))
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
            more: dict[str, object] = {"logprobs": []} if item.kind == "message" else {}
            yield self._of_item(f"response.{kind}.done", content_index=0, text=item.text, **more)
            yield self._of_item("response.content_part.done", content_index=0, part=item.part)
        yield self.numbered(
            "response.output_item.done", output_index=len(self.items) - 1, item=item.answer("completed")
        )

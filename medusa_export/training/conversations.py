"""Conversations: messages in turn, and the same as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, a system message perhaps in front.

    Attributes:
        messages: ``{"role": …, "content": …}``. An assistant's message may also have ``reasoning_content``.
        complete: Whether the last message ends where its author ended it, and not at a limit of length.
        written: The token ids of each answer in turn, if the model that wrote them is known. The ids include the token
            that ended the answer.
        source: Where the conversation was read, such as ``data.jsonl line 7``.
    """

    messages: tuple[Message, ...]
    complete: bool = True
    written: tuple[tuple[int, ...], ...] = ()
    source: str = field(default="", compare=False)

    @property
    def user_turns(self) -> tuple[str, ...]:
        """What the user says, turn by turn."""
        return tuple(message["content"] for message in self.messages if message["role"] == "user")

    @property
    def system(self) -> tuple[Message, ...]:
        """The system message, if there is one."""
        return tuple(message for message in self.messages[:1] if message["role"] == "system")

    @property
    def prompt_key(self) -> str:
        """What makes two prompts the same: their first user turn, whatever its case, spaces and punctuation."""
        first = self.user_turns[0] if self.user_turns else ""
        return " ".join("".join(c if c.isalnum() else " " for c in first.casefold()).split())

    @property
    def prompt_digest(self) -> int:
        """64 bits decided by the prompt alone, so that copies go together wherever a data set is divided by it."""
        return int.from_bytes(hashlib.sha256(self.prompt_key.encode()).digest()[:8], "big")

    def is_held_out(self, fraction: float) -> bool:
        """Whether this prompt belongs to the held-out part."""
        return self.prompt_digest < fraction * 2**64


def unique(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The first of each prompt."""
    return list({conversation.prompt_key: conversation for conversation in reversed(conversations)}.values())[::-1]


@dataclass(frozen=True)
class Sample:
    """A conversation, or the part of it up to one answer, as tokens.

    Attributes:
        input_ids: [n].
        is_label: [n], True for tokens that the assistant wrote, the end of its turn included.
    """

    input_ids: list[int]
    is_label: list[bool]

    def cut(self, length: int) -> Sample:
        """Its first tokens."""
        return Sample(self.input_ids[:length], self.is_label[:length])

"""Conversations as messages, and as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation, in order. The first may be a system message.

    Attributes:
        messages: ``{"role": …, "content": …}``. An assistant's message may also have ``reasoning_content``.
        complete: True if the author ended the last message, False if it was cut off at a limit of length.
        written: The token ids of each answer, in order, if a known model wrote them. They include the token that ended
            the answer.
        source: File and place of the conversation, such as ``data.jsonl line 7``.
    """

    messages: tuple[Message, ...]
    complete: bool = True
    written: tuple[tuple[int, ...], ...] = ()
    source: str = field(default="", compare=False)

    @property
    def user_turns(self) -> tuple[str, ...]:
        """The texts of the user's messages, in order."""
        return tuple(message["content"] for message in self.messages if message["role"] == "user")

    @property
    def system(self) -> tuple[Message, ...]:
        """The system message; empty if there is none."""
        return tuple(message for message in self.messages[:1] if message["role"] == "system")

    @property
    def prompt_key(self) -> str:
        """The first user turn without case, extra spaces and punctuation. Prompts of equal keys count as the same."""
        first = self.user_turns[0] if self.user_turns else ""
        return " ".join("".join(c if c.isalnum() else " " for c in first.casefold()).split())

    @property
    def prompt_digest(self) -> int:
        """A 64-bit digest of ``prompt_key``. Data sets are divided by it, so copies of a prompt stay together."""
        return int.from_bytes(hashlib.sha256(self.prompt_key.encode()).digest()[:8], "big")

    def is_held_out(self, fraction: float) -> bool:
        """True if this prompt belongs to the held-out part, which has ``fraction`` of all prompts."""
        return self.prompt_digest < fraction * 2**64


def unique(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations without repeated prompts: the first of each prompt stays."""
    return list({conversation.prompt_key: conversation for conversation in reversed(conversations)}.values())[::-1]


@dataclass(frozen=True)
class Sample:
    """The tokens of a conversation, or of its part up to one answer.

    Attributes:
        input_ids: Token ids, [n].
        is_label: [n], True for tokens that the assistant wrote, the end of its turn included.
    """

    input_ids: list[int]
    is_label: list[bool]

    def cut(self, length: int) -> Sample:
        """The sample's first ``length`` tokens."""
        return Sample(self.input_ids[:length], self.is_label[:length])

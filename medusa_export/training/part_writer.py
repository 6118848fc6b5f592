"""Writes the prompts, or the conversations, of one part of a distillation.

Random numbers depend only on the job's seed and the part's number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medusa_export.training.conversations import Conversation, Message
from medusa_export.training.generation import Writer

_USER_TURN_TOKENS = 256  # the most tokens of a user turn that the model writes


@dataclass(frozen=True)
class DistillSettings:
    """Settings that determine the data. A job continues only with the settings that it began with.

    Attributes:
        model: The model's name.
        prompts: Name and digest of each file of prompts, in order.
        magpie: Number of prompts that the model writes itself.
        limit: The most conversations; None for all.
        turns: The most user turns per conversation. The model writes the turns that a prompt lacks.
        system: System message for conversations without one; None for no message.
        max_new_tokens: The most tokens of an answer.
        temperature: Sampling temperature of answers; 0 is greedy.
        prompt_temperature: Sampling temperature of the user turns that the model writes.
        heldout: The fraction of prompts to hold out.
        batch_size: Conversations per part.
        seed: Seed of all random numbers.
        dtype: Type of the weights.
    """

    model: str
    prompts: list[list[str]]
    magpie: int
    limit: int | None
    turns: int
    system: str | None
    max_new_tokens: int
    temperature: float
    prompt_temperature: float
    heldout: float
    batch_size: int
    seed: int
    dtype: str


def as_prompt(conversation: Conversation, settings: DistillSettings) -> Conversation:
    """The conversation's system message, or the settings', and its first user turns without the answers."""
    system: tuple[Message, ...] = conversation.system
    if not system and settings.system is not None:
        system = ({"role": "system", "content": settings.system},)
    users = tuple({"role": "user", "content": said} for said in conversation.user_turns[: settings.turns])
    return Conversation((*system, *users), source=conversation.source)


def write_prompts(writer: Writer, settings: DistillSettings, number: int) -> list[str]:
    """Writes the prompts of a part: first messages of a user. Prompts that were cut off are left out."""
    before = as_prompt(Conversation(()), settings).messages
    written = writer.user_turns(
        [before] * settings.batch_size,
        max_new_tokens=_USER_TURN_TOKENS,
        temperature=settings.prompt_temperature,
        seed=_seed(settings, "prompts", number),
    )
    return [turn.text.strip() for turn in written if turn and turn.complete and turn.text.strip()]


def write_conversations(
    writer: Writer, settings: DistillSettings, batch: Sequence[Conversation], number: int
) -> list[dict[str, Any]]:
    """Writes the conversations of a part, and returns its rows.

    A conversation ends when it has all its turns, when an answer is cut off, when there is no room for another turn, or
    when the chat template refuses it. A prompt without room for an answer has no row. A prompt that the template
    refuses has a row with the reason.
    """
    talks = [_Talk(prompt, list(prompt.user_turns), list(prompt.system)) for prompt in batch]
    going = talks
    for turn in range(settings.turns):
        going = [talk for talk in going if talk.is_accepted(writer, turn)]
        lacking = [talk for talk in going if turn >= len(talk.users)]
        _write_user_turns(writer, settings, lacking, _seed(settings, "user", number, turn))
        going = [talk for talk in going if turn < len(talk.users)]
        going = _write_answers(writer, settings, going, turn, _seed(settings, "answers", number, turn))
    rows = [talk.row(number * settings.batch_size + place) for place, talk in enumerate(talks)]
    return [row for row in rows if row is not None]


@dataclass
class _Talk:
    """A conversation while it is written.

    Attributes:
        prompt: The prompt.
        users: The texts of the user's turns, those without an answer yet included.
        messages: The messages up to the last answer.
        ids: The token ids of each answer.
        complete: False if the last answer was cut off.
        refusal: The reason why the chat template refuses the next turn; None if it does not.
    """

    prompt: Conversation
    users: list[str]
    messages: list[Message]
    ids: list[list[int]] = field(default_factory=list)
    complete: bool = True
    refusal: str | None = None

    def asked(self, text: str) -> list[Message]:
        """The messages with another turn of the user."""
        return [*self.messages, {"role": "user", "content": text}]

    def is_accepted(self, writer: Writer, turn: int) -> bool:
        """Asks the chat template if it takes a turn, and keeps the reason if it does not."""
        self.refusal = writer.refusal(self.asked(self.users[turn] if turn < len(self.users) else "a"))
        return self.refusal is None

    def row(self, number: int) -> dict[str, Any] | None:
        """The conversation as a row of data; None if there was no room for an answer.

        Args:
            number: The number of the row.
        """
        found: dict[str, Any] = {"id": number, "messages": self.messages}
        if self.ids:
            found |= {"complete": self.complete, "tokens": sum(map(len, self.ids)), "written": self.ids}
            return found if self.refusal is None else found | {"ended": self.refusal}
        if self.refusal is None:
            return None
        return found | {"messages": list(self.prompt.messages), "tokens": 0, "refused": self.refusal}


def _write_user_turns(writer: Writer, settings: DistillSettings, talks: Sequence[_Talk], seed: int) -> None:
    """Writes the next turn of the user in each conversation. A turn that is cut off or empty is left out."""
    written = writer.user_turns(
        [talk.messages for talk in talks],
        max_new_tokens=_USER_TURN_TOKENS,
        temperature=settings.prompt_temperature,
        seed=seed,
    )
    for talk, said in zip(talks, written, strict=True):
        if said and said.complete and said.text.strip():
            talk.users.append(said.text.strip())


def _write_answers(
    writer: Writer, settings: DistillSettings, talks: Sequence[_Talk], turn: int, seed: int
) -> list[_Talk]:
    """Answers a turn of the user in each conversation. Returns the conversations that can go on after it."""
    asked = [talk.asked(talk.users[turn]) for talk in talks]
    answers = writer.answer(asked, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=seed)
    for talk, before, answer in zip(talks, asked, answers, strict=True):
        if answer:
            talk.messages = [*before, {"role": "assistant", "content": answer.text}]
            talk.complete = answer.complete
            talk.ids.append(list(answer.ids))
    return [talk for talk, answer in zip(talks, answers, strict=True) if answer and answer.complete]


def _seed(settings: DistillSettings, *place: object) -> int:
    """The seed of one batch of texts, named by its place in the job."""
    digest = hashlib.sha256(repr((settings.seed, *place)).encode()).digest()
    return int.from_bytes(digest[:4], "big")

"""Writes the prompts, or the conversations, of one part of a distillation.

Random numbers depend only on the job's seed and the part's number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
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
    users = [list(prompt.user_turns) for prompt in batch]
    talks: list[list[Message]] = [list(prompt.system) for prompt in batch]
    complete = [True] * len(batch)
    ids: list[list[list[int]]] = [[] for _ in batch]
    refused: dict[int, str] = {}
    going = list(range(len(batch)))
    for turn in range(settings.turns):
        for row in going:
            question = users[row][turn] if turn < len(users[row]) else "a"
            if reason := writer.refusal([*talks[row], {"role": "user", "content": question}]):
                refused[row] = reason
        going = [row for row in going if row not in refused]
        lacking = [row for row in going if turn >= len(users[row])]
        written = writer.user_turns(
            [talks[row] for row in lacking],
            max_new_tokens=_USER_TURN_TOKENS,
            temperature=settings.prompt_temperature,
            seed=_seed(settings, "user", number, turn),
        )
        for row, said in zip(lacking, written, strict=True):
            if said and said.complete and said.text.strip():
                users[row].append(said.text.strip())
        going = [row for row in going if turn < len(users[row])]
        asked: list[list[Message]] = [[*talks[row], {"role": "user", "content": users[row][turn]}] for row in going]
        answers = writer.answer(
            asked,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=_seed(settings, "answers", number, turn),
        )
        for row, before, answer in zip(going, asked, answers, strict=True):
            if answer:
                talks[row] = [*before, {"role": "assistant", "content": answer.text}]
                complete[row] = answer.complete
                ids[row].append(list(answer.ids))
        going = [row for row, answer in zip(going, answers, strict=True) if answer and answer.complete]
    rows: list[dict[str, Any]] = []
    for row, prompt in enumerate(batch):
        found: dict[str, Any] = {"id": number * settings.batch_size + row, "messages": talks[row]}
        if ids[row]:
            tokens = sum(map(len, ids[row]))
            found |= {"complete": complete[row], "tokens": tokens, "written": ids[row]}
            rows.append(found | ({"ended": refused[row]} if row in refused else {}))
        elif row in refused:
            rows.append(found | {"messages": list(prompt.messages), "tokens": 0, "refused": refused[row]})
    return rows


def _seed(settings: DistillSettings, *place: object) -> int:
    """The seed of one batch of texts, named by its place in the job."""
    digest = hashlib.sha256(repr((settings.seed, *place)).encode()).digest()
    return int.from_bytes(digest[:4], "big")

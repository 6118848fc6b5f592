"""Conversations: read from files of the shapes in use, split by prompt, and turned into tokens with a label mask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from medusa_export.checkpoints import load_tokenizer
from medusa_export.errors import DatasetError

Message = dict[str, str]

# Who speaks, by the names that data sets give them.
_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, a system message perhaps in front.

    Attributes:
        messages: ``{"role": …, "content": …}``.
        complete: Whether the last message ends where its author ended it, and not at a limit of length.
    """

    messages: tuple[Message, ...]
    complete: bool = True

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


def read_conversations(path: Path) -> list[Conversation]:
    """Reads a file of prompts or conversations.

    A ``.txt`` file has a prompt per line. A ``.json`` or ``.jsonl`` file has objects: ``messages`` (role, content),
    ShareGPT's ``conversations`` (from, value), UltraChat's ``data`` (texts in turn), or one of ``prompt``,
    ``instruction`` (with ``input``), ``question`` and ``text``.

    Raises:
        DatasetError: The file can't be read, or a row is of none of these shapes; the message names its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} can't be read: {error}.") from error
    if path.suffix not in (".json", ".jsonl"):
        found = [_from_prompt(line.strip()) for line in text.split("\n") if line.strip()]
    else:
        found = [_parse(row, f"{path}, {place}") for place, row in _rows(path, text)]
    if not found:
        raise DatasetError(f"{path} holds no prompts: give one per line, or JSON objects with messages.")
    return found


def _rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DatasetError(f"{path} is not valid JSON: {error}.") from error
        yield from ((f"entry {number}", row) for number, row in enumerate(rows))
        return
    for number, line in enumerate(text.split("\n"), 1):  # not at other breaks, which a text may hold
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise DatasetError(
                    f"{path}, line {number} is not valid JSON ({error}): the file is damaged or cut off."
                ) from error


def _from_prompt(prompt: str) -> Conversation:
    return Conversation(({"role": "user", "content": prompt},))


def _parse(row: Any, where: str) -> Conversation:
    if isinstance(row, str):
        return _from_prompt(row)
    if not isinstance(row, dict):
        raise DatasetError(f"{where} holds {type(row).__name__}: expected an object with messages or a prompt.")
    turns = row.get("messages") or row.get("conversations") or row.get("conversation")
    if isinstance(turns, list):
        messages = tuple(_message(turn, where) for turn in turns)
    elif isinstance(row.get("data"), list):
        roles = ("user", "assistant")
        messages = tuple({"role": roles[i % 2], "content": str(said)} for i, said in enumerate(row["data"]))
    else:
        prompt = next((row[key] for key in ("prompt", "instruction", "question", "text") if row.get(key)), None)
        if not isinstance(prompt, str):
            raise DatasetError(
                f"{where} has the keys {', '.join(map(repr, row)) or '(none)'}: expected 'messages', 'conversations', "
                "'data' or 'prompt'."
            )
        messages = _from_prompt(f"{prompt}\n\n{row['input']}" if row.get("input") else prompt).messages
    if not any(message["role"] == "user" for message in messages):
        raise DatasetError(f"{where} has no message of a user.")
    return Conversation(messages, complete=bool(row.get("complete", True)))


def _message(turn: Any, where: str) -> Message:
    if isinstance(turn, dict):
        role = _ROLES.get(str(turn.get("role", turn.get("from"))).lower())
        content = turn.get("content", turn.get("value"))
        if role is not None and isinstance(content, str):
            return {"role": role, "content": content}
    raise DatasetError(
        f"{where} holds the turn {str(turn)[:80]!r}: expected a role and content (or from and value), of a user, an "
        "assistant or a system."
    )


def load_chat_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that holds conversations.

    Raises:
        CheckpointError: It can't be read.
        DatasetError: There is none, or it has no chat template.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer is None or tokenizer.chat_template is None:
        raise DatasetError(
            f"{model} has no chat template, so it is not known how it reads conversations: give an instruct model."
        )
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answering: bool) -> str:
    """A conversation as the model sees it; ``answering`` opens the assistant's turn.

    Raises:
        DatasetError: The tokenizer has no chat template, or it refuses these messages.
    """
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # a template raises what it likes
        raise DatasetError(f"The chat template can't render these messages: {error}") from error
    return text


@dataclass(frozen=True)
class Sample:
    """A conversation as tokens.

    Attributes:
        input_ids: [n].
        is_label: [n], True for tokens that the assistant wrote, the end of its turn included.
    """

    input_ids: list[int]
    is_label: list[bool]

    def cut(self, length: int) -> Sample:
        """Its first tokens."""
        return Sample(self.input_ids[:length], self.is_label[:length])


def tokenize(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Sample:
    """Tokens of a conversation, and which of them the assistant wrote.

    Works on the rendered text, so no support by the chat template is needed: an assistant's turn is what
    the template puts where its content stands, and the special token that ends it. A space before it counts for
    nothing, as tokens of words have it within them.

    Raises:
        DatasetError: The chat template hides or alters an assistant's message.
    """
    text = render(tokenizer, conversation.messages, answering=False)
    special = special_tokens(tokenizer)
    spans: list[tuple[int, int]] = []
    place = 0
    for number, message in enumerate(conversation.messages):
        content = message["content"].strip()
        if message["role"] == "assistant":
            opened = max(place, _opening(tokenizer, conversation.messages[:number], text))
            place = opened if content in text[opened:] else place
        start = text.find(content, place)
        if start < 0:
            if message["role"] == "assistant":
                raise DatasetError(f"The chat template alters what the assistant says: {content[:60]!r} is not in it.")
            continue
        place = start + len(content)
        if message["role"] == "assistant":
            spans.append((start, place + _end_of_turn(special, text[place:])))
    if not conversation.complete and spans:
        spans[-1] = (spans[-1][0], place)
        text = text[:place]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = [(_begins(text, first, last), last) for first, last in encoded["offset_mapping"]]
    is_label = [any(start <= first and last <= end for start, end in spans) for first, last in places]
    return Sample(list(encoded["input_ids"]), is_label)


def _begins(text: str, first: int, last: int) -> int:
    """Where a token's word begins, behind spaces; a token of nothing else is one itself."""
    return last - len(text[first:last].lstrip()) if text[first:last].strip() else first


def _opening(tokenizer: PreTrainedTokenizerBase, before: Sequence[Message], text: str) -> int:
    """Where the assistant's turn after some messages begins in a text: a short answer may occur in its header, too.

    0 where the template alone doesn't say: it may refuse what has no user's turn, or render a last turn in another way.
    """
    with suppress(DatasetError):
        opening = render(tokenizer, before, answering=True)
        if text.startswith(opening):
            return len(opening)
    return 0


def _end_of_turn(special: Iterable[str], rest: str) -> int:
    """The length of the special token that ``rest`` begins with, and of spaces before it; 0 without one."""
    spaces = len(rest) - len(rest.lstrip())
    found = max((len(token) for token in special if rest.startswith(token, spaces)), default=0)
    return spaces + found if found else 0


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """All special tokens and their ids, with those that have no role, such as the end of a turn often."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) | added

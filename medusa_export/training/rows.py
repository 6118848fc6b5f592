"""Reads files of prompts or conversations. Rows that can't be used are skipped, each with a reason."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_export.common.errors import DatasetError
from medusa_export.training.conversations import Conversation, Message

# The role that each name in data sets stands for.
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "student"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model", "bot", "chatbot", "ai", "function_call"),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
}
_TURNS = ("messages", "conversations", "conversation")
_PROMPTS = ("prompt", "instruction", "question", "text")
_ANSWERS = ("completion", "response", "output", "answer")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_LEADING = ("\ufeff", "\u200b")  # invisible characters that editors leave before a text
_MOST_CHARACTERS = 20_000_000
_NAMED = 5  # skipped rows that a summary names
_KEPT = 100  # skipped rows that a job's description names
# The first bytes of files that are not text.
_BINARY = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed by gzip",
    b"PK": "a zip file",
    b"ARROW1": "an Arrow file",
}
_TWICE = 0  # marks objects that have a key twice; a JSON object has no key like this number


class _UnusableError(ValueError):
    """A row can't be used; the message is the reason."""


@dataclass(frozen=True)
class Skipped:
    """A row that is not used.

    Attributes:
        source: The row's file and its place there, such as ``data.jsonl line 7``.
        reason: The reason why it can't be used.
    """

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"

    @property
    def order(self) -> tuple[str, int]:
        """The sort key of skipped rows: file, and number of the line."""
        name, _, number = self.source.rpartition(" ")
        return name, int(number) if number.isdecimal() else 0


@dataclass(frozen=True)
class Reading:
    """The rows of one or several files.

    Attributes:
        conversations: The rows that can be used.
        skipped: The rows that can't be used.
    """

    conversations: list[Conversation]
    skipped: list[Skipped]

    @property
    def rows(self) -> int:
        """Number of all rows."""
        return len(self.conversations) + len(self.skipped)


def summary(skipped: Sequence[Skipped], rows: int) -> str:
    """A line with the number of skipped rows, and the reasons for the first of them.

    Args:
        skipped: The skipped rows.
        rows: Number of all rows.
    """
    named = "; ".join(map(str, skipped[:_NAMED]))
    more = f"; and {len(skipped) - _NAMED:,} more" if len(skipped) > _NAMED else ""
    return f"skipped {len(skipped):,} of {rows:,} rows: {named}{more}"


def facts(skipped: Sequence[Skipped], rows: int) -> dict[str, Any]:
    """Number and reasons of skipped rows, as JSON values for a job's description.

    Args:
        skipped: The skipped rows.
        rows: Number of all rows.
    """
    return {"rows": {"read": rows, "skipped": len(skipped), "first": [str(row) for row in skipped[:_KEPT]]}}


def check_skipped(skipped: Sequence[Skipped], rows: int, *, strict: bool) -> None:
    """Refuses data if no row can be used, or if ``strict`` is set and a row is skipped.

    Raises:
        DatasetError: The data is refused.
    """
    if skipped and len(skipped) == rows:
        raise DatasetError(f"No row can be used: {summary(skipped, rows)}.")
    if skipped and strict:
        raise DatasetError(f"With `strict=True`, no row is skipped, but this would be: {summary(skipped, rows)}.")


def read_conversations(path: Path) -> Reading:
    """Reads a file of prompts or conversations.

    A text file has a prompt per line. A JSON file has an array of objects, or an object per line. Each object has one
    of these:

    - ``messages`` (role, content);
    - ShareGPT's ``conversations`` (from, value);
    - UltraChat's ``data`` (texts of user and assistant in turn);
    - a prompt as ``prompt``, ``instruction`` (with ``input``), ``question`` or ``text``, and optionally an answer as
      ``completion``, ``response``, ``output`` or ``answer``.

    Files with the suffix .json, .jsonl or .ndjson are JSON. For other files the content decides.

    Raises:
        DatasetError: The file can't be read, or holds nothing that can be used.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} can't be read: {error}.") from error
    text = _decoded(path, data)
    found: list[Conversation] = []
    skipped: list[Skipped] = []
    rows = _json_rows(path, text) if _is_json(path, text) else _text_rows(text)
    for place, row in rows:
        source = f"{path.name} {place}"
        try:
            found.append(_parsed(row, source))
        except _UnusableError as error:
            skipped.append(Skipped(source, str(error)))
    if not found and not skipped:
        raise DatasetError(f"{path} holds no prompts: give one per line, or JSON objects with messages.")
    check_skipped(skipped, len(found) + len(skipped), strict=False)
    return Reading(found, skipped)


def _decoded(path: Path, data: bytes) -> str:
    """The text of a file. Bytes that are not UTF-8 become surrogates, so that only their rows are skipped."""
    for start, kind in _BINARY.items():
        if data.startswith(start):
            raise DatasetError(f"{path} is {kind}: give text, with a prompt per line, or JSON lines.")
    for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if data.startswith(mark):
            return data.decode("utf-16", errors="replace").removeprefix("\ufeff")
    return data.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _is_json(path: Path, text: str) -> bool:
    """True if a file is JSON: by its suffix, or because its first line, or its whole text, is an object or array."""
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        return True
    start = text.lstrip()
    if start[:1] not in ("[", "{"):
        return False
    for part in (start.split("\n", 1)[0], start):
        try:
            first = _loads(part)
        except ValueError:
            continue
        rows = first if isinstance(first, list) else [first]
        return bool(rows) and all(isinstance(row, dict) for row in rows)
    return False


def _text_rows(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): a prompt may hold other line breaks
        if cleaned := _cleaned(line):
            yield f"line {number}", cleaned


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON file, with their places. A row of invalid JSON is an ``_UnusableError``."""
    if text.lstrip().startswith("["):
        try:
            rows = _loads(text)
        except ValueError as error:
            raise DatasetError(f"{path} is not valid JSON: {error}. The file is damaged or cut off.") from error
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, 1))
        return
    lines = [(number, cleaned) for number, line in enumerate(text.split("\n"), 1) if (cleaned := _cleaned(line))]
    if len(lines) > 1 and lines[0][1].startswith("{"):
        try:
            _loads(lines[0][1])
        except ValueError:
            try:  # the file may be one object on several lines
                whole = _loads(text)
            except ValueError:
                pass
            else:
                yield "entry 1", whole
                return
    for number, line in lines:
        try:
            row = _loads(line)
        except ValueError as error:
            row = _UnusableError(f"it is not valid JSON ({error})")
        yield f"line {number}", row


def _cleaned(line: str) -> str:
    """A line without spaces around it and invisible characters before it."""
    line = line.strip()
    while line.startswith(_LEADING):
        line = line[1:].lstrip()
    return line


def _loads(text: str) -> Any:
    """Parses JSON.

    Raises:
        ValueError: The text is not valid JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
    """A JSON object as a dictionary. If a key occurs twice, the entry ``_TWICE`` names it."""
    found: dict[Any, Any] = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        found[_TWICE] = next(key for key in keys if keys.count(key) > 1)
    return found


def _parsed(row: Any, source: str) -> Conversation:
    """The conversation in a row.

    Raises:
        _UnusableError: The row has no usable conversation.
    """
    if isinstance(row, _UnusableError):
        raise row
    if isinstance(row, str):
        messages = [_message("user", row)]
        row = {}
    elif isinstance(row, dict):
        _check_once(row)
        messages = _messages(row)
    else:
        raise _UnusableError(f"it holds {type(row).__name__}, not an object with messages or a prompt")
    messages = _from_first_user(messages)
    if sum(len(message["content"]) for message in messages) > _MOST_CHARACTERS:
        raise _UnusableError(f"it has more than {_MOST_CHARACTERS:,} characters")
    written = _written(row)
    if len(written) != sum(message["role"] == "assistant" for message in messages):
        written = ()
    return Conversation(tuple(messages), complete=row.get("complete") is not False, written=written, source=source)


def _messages(row: dict[Any, Any]) -> list[Message]:
    turns = next((row[key] for key in _TURNS if row.get(key) is not None), None)
    prompt = next((row[key] for key in _PROMPTS if row.get(key)), None)
    answer = next((row[key] for key in _ANSWERS if row.get(key)), None)
    if turns is None and isinstance(prompt, list):  # the prompt is a list of messages, and the answer may be one
        turns = [*prompt, *answer] if isinstance(answer, list) else prompt
        answer = None if isinstance(answer, list) else answer
    if turns is not None:
        if not isinstance(turns, list):
            raise _UnusableError(f"its messages are {type(turns).__name__}, not a list")
        if not turns:
            raise _UnusableError("its conversation is empty")
        system = row.get("system") or row.get("system_prompt")
        messages = [_turn(turn) for turn in turns]
        if isinstance(system, str) and messages[0]["role"] != "system":
            messages.insert(0, _message("system", system))
        return messages + ([_message("assistant", answer)] if isinstance(prompt, list) and answer else [])
    if isinstance(row.get("data"), list):
        if not all(isinstance(said, str) for said in row["data"]):
            raise _UnusableError("its 'data' holds values that are not texts")
        return [_message(("user", "assistant")[place % 2], said) for place, said in enumerate(row["data"])]
    if not isinstance(prompt, str):
        raise _UnusableError(
            f"it has the keys {', '.join(repr(key) for key in row) or '(none)'}, but none of 'messages', "
            "'conversations', 'data' and 'prompt' with text"
        )
    messages = [_message("user", f"{prompt}\n\n{row['input']}" if row.get("input") else prompt)]
    return [*messages, _message("assistant", answer)] if isinstance(answer, str) else messages


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise _UnusableError(
            f"it holds the turn {str(turn)[:80]!r}, not an object with role and content (or from and value)"
        )
    _check_once(turn)
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(str(name).strip().lower())
    if role is None:
        raise _UnusableError(f"it holds a turn of {str(name)[:80]!r}, which is not a known role")
    message = _message(role, _text(turn.get("content", turn.get("value")), str(name)))
    thought = next((turn[key] for key in _THOUGHTS if isinstance(turn.get(key), str) and turn[key].strip()), None)
    if role == "assistant" and thought is not None:
        message |= {key: _message(role, thought)["content"] for key in _THOUGHTS}  # templates read different keys
    return message


def _text(content: Any, name: str) -> str:
    """The text of a turn: its content, or the joined parts of its content."""
    if isinstance(content, str):
        return content
    if content is None:
        raise _UnusableError(f"a turn of {name!r} has no text")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
        raise _UnusableError(f"a turn of {name!r} has parts that are not text")
    raise _UnusableError(f"the content of a turn of {name!r} is {type(content).__name__}, not text")


def _message(role: str, text: str) -> Message:
    """A message of a role and a text.

    Raises:
        _UnusableError: The text is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _UnusableError("its text is not valid UTF-8") from error
    return {"role": role, "content": text.removeprefix("\ufeff")}


def _from_first_user(messages: list[Message]) -> list[Message]:
    """The messages from the first user message on, with the system messages before it.

    Raises:
        _UnusableError: There is no user message, or all user messages are empty.
    """
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise _UnusableError("it has no user message")
    if not any(message["content"].strip() for message in messages if message["role"] == "user"):
        raise _UnusableError("its user messages are empty")
    return [message for message in messages[:first] if message["role"] == "system"] + messages[first:]


def _check_once(found: dict[Any, Any]) -> None:
    """Refuses an object that has a key twice."""
    if _TWICE in found:
        raise _UnusableError(f"it has the key {found[_TWICE]!r} twice")


def _written(row: dict[Any, Any]) -> tuple[tuple[int, ...], ...]:
    """The token ids of each answer; empty if the row does not have them."""
    written = row.get("written")
    if not isinstance(written, list) or not all(isinstance(ids, list) for ids in written):
        return ()
    if not all(type(token) is int for ids in written for token in ids):
        return ()
    return tuple(tuple(ids) for ids in written)

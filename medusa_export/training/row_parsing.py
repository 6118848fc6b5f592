"""Conversations out of rows of data sets, in the forms that are in use. Rows that can't be used are refused."""

from __future__ import annotations

from typing import Any

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
_MOST_CHARACTERS = 20_000_000
TWICE = 0  # marks objects that have a key twice; a JSON object has no key like this number


class UnusableError(ValueError):
    """A row can't be used; the message is the reason."""


def parsed_row(row: Any, source: str) -> Conversation:
    """The conversation in a row of a data set.

    Args:
        row: The row: an object, a text, or the error that reading it gave.
        source: The row's file and its place there.

    Raises:
        UnusableError: The row has no usable conversation.
    """
    if isinstance(row, UnusableError):
        raise row
    if isinstance(row, str):
        messages = [_message("user", row)]
        row = {}
    elif isinstance(row, dict):
        _check_once(row)
        messages = _messages(row)
    else:
        raise UnusableError(f"it holds {type(row).__name__}, not an object with messages or a prompt")
    messages = _from_first_user(messages)
    if sum(len(message["content"]) for message in messages) > _MOST_CHARACTERS:
        raise UnusableError(f"it has more than {_MOST_CHARACTERS:,} characters")
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
            raise UnusableError(f"its messages are {type(turns).__name__}, not a list")
        if not turns:
            raise UnusableError("its conversation is empty")
        system = row.get("system") or row.get("system_prompt")
        messages = [_turn(turn) for turn in turns]
        if isinstance(system, str) and messages[0]["role"] != "system":
            messages.insert(0, _message("system", system))
        return messages + ([_message("assistant", answer)] if isinstance(prompt, list) and answer else [])
    if isinstance(row.get("data"), list):
        if not all(isinstance(said, str) for said in row["data"]):
            raise UnusableError("its 'data' holds values that are not texts")
        return [_message(("user", "assistant")[place % 2], said) for place, said in enumerate(row["data"])]
    if not isinstance(prompt, str):
        raise UnusableError(
            f"it has the keys {', '.join(repr(key) for key in row) or '(none)'}, but none of 'messages', "
            "'conversations', 'data' and 'prompt' with text"
        )
    messages = [_message("user", f"{prompt}\n\n{row['input']}" if row.get("input") else prompt)]
    return [*messages, _message("assistant", answer)] if isinstance(answer, str) else messages


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise UnusableError(
            f"it holds the turn {str(turn)[:80]!r}, not an object with role and content (or from and value)"
        )
    _check_once(turn)
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(str(name).strip().lower())
    if role is None:
        raise UnusableError(f"it holds a turn of {str(name)[:80]!r}, which is not a known role")
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
        raise UnusableError(f"a turn of {name!r} has no text")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
        raise UnusableError(f"a turn of {name!r} has parts that are not text")
    raise UnusableError(f"the content of a turn of {name!r} is {type(content).__name__}, not text")


def _message(role: str, text: str) -> Message:
    """A message of a role and a text.

    Raises:
        UnusableError: The text is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableError("its text is not valid UTF-8") from error
    return {"role": role, "content": text.removeprefix("\ufeff")}


def _from_first_user(messages: list[Message]) -> list[Message]:
    """The messages from the first user message on, with the system messages before it.

    Raises:
        UnusableError: There is no user message, or all user messages are empty.
    """
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise UnusableError("it has no user message")
    if not any(message["content"].strip() for message in messages if message["role"] == "user"):
        raise UnusableError("its user messages are empty")
    return [message for message in messages[:first] if message["role"] == "system"] + messages[first:]


def _check_once(found: dict[Any, Any]) -> None:
    """Refuses an object that has a key twice."""
    if TWICE in found:
        raise UnusableError(f"it has the key {found[TWICE]!r} twice")


def _written(row: dict[Any, Any]) -> tuple[tuple[int, ...], ...]:
    """The token ids of each answer; empty if the row does not have them."""
    written = row.get("written")
    if not isinstance(written, list) or not all(isinstance(ids, list) for ids in written):
        return ()
    if not all(type(token) is int for ids in written for token in ids):
        return ()
    return tuple(tuple(ids) for ids in written)

"""The content of messages: text, or parts of text, given to a chat template in the form that it takes.

Some templates print content that is a list as Python shows it, others print nothing where content is a string. Which
forms a template takes for a role is found by a try: a template is a program, and its text alone does not tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import Flag
from typing import Any

from medusa_runtime.errors import RequestError
from medusa_runtime.text.limits import shown

# What separates parts that become one string: they are paragraphs of their own, as other servers have it.
SEPARATOR = "\n"
_TEXT_PARTS = ("text", "input_text", "output_text")
_FIRST, _SECOND = "tryfirstpart", "trysecondpart"
# A list that was printed rather than read.
_PRINTED = re.compile(r"""["']text["']\s*:""")


class Takes(Flag):
    """The forms of content that a template takes."""

    TEXT = 1
    PARTS = 2


def checked_content(content: object, number: int) -> str | list[dict[str, Any]]:
    """The content of a message: a string, or a list of ``{"type": "text", "text": …}``.

    Args:
        content: What was given.
        number: The message's place in the chat.

    Raises:
        RequestError: It is neither text nor parts of text.
    """
    if isinstance(content, str):
        return str.__str__(content)
    if not isinstance(content, (list, tuple)):
        raise RequestError(
            f"The content of message {number} is {shown(content)}: give a string, or a list of parts such as "
            "{'type': 'text', 'text': …}."
        )
    return [{"type": "text", "text": _text_of(part, number)} for part in content]


def _text_of(part: object, number: int) -> str:
    if isinstance(part, str):
        return str.__str__(part)
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind not in _TEXT_PARTS:
        raise RequestError(f"Message {number} holds a part of the type {shown(kind)}, but this model reads text only.")
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise RequestError(
            f"Message {number} holds the part {shown(part)}: give parts such as {{'type': 'text', 'text': …}}."
        )
    return str.__str__(text)


def in_form(content: str | Sequence[Mapping[str, Any]], takes: Takes) -> str | list[dict[str, Any]]:
    """Checked content in a form that a template takes; as it is where the template takes both."""
    if isinstance(content, str):
        return content if Takes.TEXT in takes else [{"type": "text", "text": content}]
    if Takes.PARTS in takes:
        return [dict(part) for part in content]
    return SEPARATOR.join(part["text"] for part in content)


def find_takes(rendered: Callable[[list[dict[str, Any]]], str], role: str) -> Takes:
    """The forms of content that a template takes in messages of a role; text if the try says nothing.

    Args:
        rendered: Renders messages, without an opening for the answer; it may raise ``RequestError``.
        role: The role.
    """
    takes = Takes(0)
    parts = [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}]
    for form, content in ((Takes.TEXT, _FIRST + _SECOND), (Takes.PARTS, parts)):
        try:
            text = rendered(_try(role, content))
        except RequestError:
            continue
        if _FIRST in text and _SECOND in text and not _PRINTED.search(text):
            takes |= form
    return takes or Takes.TEXT


def _try(role: str, content: object) -> list[dict[str, Any]]:
    """A chat of which most templates render a message of that role."""
    user, message = {"role": "user", "content": "question"}, {"role": role, "content": content}
    if role == "user":
        return [message]
    if role == "assistant":
        return [user, message, user]
    if role == "tool":
        call = {"id": "call00000", "type": "function", "function": {"name": "look", "arguments": {}}}
        asked = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [user, asked, message | {"name": "look", "tool_call_id": call["id"]}]
    return [message, user]

"""The content of chat messages: a string or a list of text parts, in a form that the chat template supports.

A template that does not support lists prints them as Python shows them. A template that does not support strings prints
nothing. A template is a program, so its text does not show which forms it supports. So both forms are rendered once for
each role, and the result is checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import Flag
from typing import Any

from medusa_runtime.errors import RequestError
from medusa_runtime.text.limits import shown

# Separates parts that are joined to one string. Other servers use a line break, too.
SEPARATOR = "\n"
_TEXT_PARTS = ("text", "input_text", "output_text")
_FIRST, _SECOND = "tryfirstpart", "trysecondpart"
# Matches a list that a template printed as Python shows it.
_PRINTED = re.compile(r"""["']text["']\s*:""")


class ContentForms(Flag):
    """Forms of content that a template supports."""

    TEXT = 1
    PARTS = 2


def checked_content(content: object, number: int) -> str | list[dict[str, Any]]:
    """The content of a message: a string, or a list of ``{"type": "text", "text": …}``.

    Args:
        content: The content that the caller gave.
        number: Index of the message in the chat.

    Raises:
        RequestError: The content is neither a string nor a list of text parts.
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
        raise RequestError(
            f"Message {number} holds a part of the type {shown(kind)}, but this model reads only text: leave it out."
        )
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise RequestError(
            f"Message {number} holds the part {shown(part)}: give parts such as {{'type': 'text', 'text': …}}."
        )
    return str.__str__(text)


def in_form(content: str | Sequence[Mapping[str, Any]], forms: ContentForms) -> str | list[dict[str, Any]]:
    """Content in a form that a template supports. If the template supports both forms, content stays as it is.

    Args:
        content: Content that ``checked_content`` returned.
        forms: The forms that the template supports.
    """
    if isinstance(content, str):
        return content if ContentForms.TEXT in forms else [{"type": "text", "text": content}]
    if ContentForms.PARTS in forms:
        return [dict(part) for part in content]
    return SEPARATOR.join(part["text"] for part in content)


def find_forms(rendered: Callable[[list[dict[str, Any]]], str], role: str) -> ContentForms:
    """Renders both forms of content to find those that a template supports; text if neither is rendered.

    Args:
        rendered: Renders messages, without an opening for the answer. May raise ``RequestError``.
        role: Role of the messages.
    """
    forms = ContentForms(0)
    parts = [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}]
    for form, content in ((ContentForms.TEXT, _FIRST + _SECOND), (ContentForms.PARTS, parts)):
        try:
            text = rendered(_try(role, content))
        except RequestError:
            continue
        if _FIRST in text and _SECOND in text and not _PRINTED.search(text):
            forms |= form
    return forms or ContentForms.TEXT


def _try(role: str, content: object) -> list[dict[str, Any]]:
    """A short chat with a message of a role, in an order of roles that most templates accept."""
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

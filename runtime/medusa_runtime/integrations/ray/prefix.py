"""The start of a prompt, and the order in which replicas are preferred for it."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import msgspec

_NONE = msgspec.Raw(b"null")


class _Message(msgspec.Struct):
    """A message of a chat, or an item of a response's input. Other fields are skipped."""

    role: str = ""
    content: msgspec.Raw = _NONE


class _Body(msgspec.Struct):
    """The fields of a request that hold its prompt. Each stays JSON."""

    messages: msgspec.Raw = _NONE
    instructions: msgspec.Raw = _NONE
    input: msgspec.Raw = _NONE
    prompt: msgspec.Raw = _NONE


def prompt_start(body: bytes, length: int) -> bytes | None:
    """The start of a request's prompt, as JSON text. Requests with the same start share entries of a cache.

    A chat counts up to its first message of a user, so that all turns of a conversation have the same start.

    Args:
        body: The request's body.
        length: The most bytes of the start.

    Returns:
        The start; None if the body has no prompt.
    """
    try:
        fields = msgspec.json.decode(body, type=_Body)
        texts = [_opening(fields.messages), bytes(fields.instructions), _opening(fields.input), bytes(fields.prompt)]
    except (msgspec.DecodeError, UnicodeDecodeError):  # the server refuses the request
        return None
    start = b"".join(text for text in texts if text != b"null")
    return start[:length] or None


def _opening(messages: msgspec.Raw) -> bytes:
    """The contents of the messages up to the first of a user; the text itself if it is no list of messages."""
    try:
        found = msgspec.json.decode(messages, type=list[_Message])
    except msgspec.ValidationError:
        return bytes(messages)
    contents = []
    for message in found:
        contents.append(bytes(message.content))
        if message.role == "user":
            break
    return b"".join(contents)


def by_preference(start: bytes, replicas: Iterable[str]) -> list[str]:
    """Replicas in the order in which they are preferred for a prompt (rendezvous hashing).

    All routers find the same order without asking each other. If a replica comes or goes, the others keep their order.

    Args:
        start: The start of the prompt.
        replicas: Names of the replicas.
    """
    return sorted(replicas, key=lambda name: blake2b(name.encode() + start, digest_size=8).digest())

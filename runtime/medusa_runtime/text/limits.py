"""Bounds of a request's content. Without them, a request could take seconds of CPU time before it is refused."""

from __future__ import annotations

import reprlib
from itertools import islice
from typing import TYPE_CHECKING

from medusa_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

# UTF-8 bytes of a text prompt, or of all strings in a chat. A million tokens of English text have about this size.
MAX_TEXT_BYTES = 4 * 2**20
# UTF-8 bytes of a text per token of a model's context, if the tokenizer has no bound. English has 4 to 5. Encoding
# takes up to 400 bytes of memory for each byte of text: 210 MB for a context of 32,768 tokens.
MAX_BYTES_PER_TOKEN = 16
# Texts up to this number of bytes are always encoded. They take 26 MB of memory.
SHORT_TEXT_BYTES = 2**16
MAX_MESSAGES = 10_000
# Values (strings, numbers, lists, objects) in all messages of a chat, or in one template variable.
MAX_CHAT_VALUES = 200_000
# Depth of nested lists and objects.
MAX_DEPTH = 64
MAX_STOP_STRINGS = 256
# Characters of all stop strings of a request together. Each character takes a state of the automaton that finds them.
MAX_STOP_CHARACTERS = 16_384

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def shown(value: object) -> str:
    """A value of any type as text for an error message, shortened."""
    try:
        return _repr.repr(value)
    except Exception:  # noqa: BLE001  # from a caller's own __repr__, or for an integer of more digits than Python prints
        return f"a {type(value).__name__}"


def bounded(name: str, values: Iterable[object], most: int) -> list[object]:
    """The values as a list. At most ``most + 1`` values are read, so an endless iterator is safe.

    Args:
        name: Name of the argument that holds the values, for messages.
        values: The values.
        most: The most values that are allowed.

    Raises:
        RequestError: There are more than ``most`` values.
    """
    found = list(islice(values, most + 1))
    if len(found) > most:
        raise RequestError(f"{name} may hold {most:,} entries at most: give fewer.")
    return found

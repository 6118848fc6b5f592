"""Bounds of what a request may hold, so that no request takes a processor for seconds before it is refused."""

from __future__ import annotations

import reprlib
from itertools import islice
from typing import TYPE_CHECKING

from medusa_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

# UTF-8 bytes of a prompt as text, or of all strings in a chat. A million tokens of English take about as much.
MAX_TEXT_BYTES = 4 * 2**20
# UTF-8 bytes of a text per token of a model's context, where the tokenizer gives no bound. English has 4 to 5. Encoding
# takes up to 400 bytes of memory for each: 210 MB for a context of 32,768 tokens.
MAX_BYTES_PER_TOKEN = 16
# Bytes of a text that are always encoded: 26 MB of memory.
SHORT_TEXT_BYTES = 2**16
MAX_MESSAGES = 10_000
# Values in all messages of a chat, or in one template variable: strings, numbers, lists, objects.
MAX_CHAT_VALUES = 200_000
# Lists and objects within each other.
MAX_DEPTH = 64
MAX_STOP_STRINGS = 256
# Of all stop strings of a request together. Each character takes a state of the automaton that finds them.
MAX_STOP_CHARACTERS = 16_384

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def shown(value: object) -> str:
    """A value in an error message, shortened, whatever it is."""
    try:
        return _repr.repr(value)
    except Exception:  # noqa: BLE001  # a stranger's __repr__, or an integer of more digits than Python prints
        return f"a {type(value).__name__}"


def bounded(name: str, values: Iterable[object], most: int) -> list[object]:
    """The values as a list.

    Raises:
        RequestError: They are more than ``most``; an iterator without end is read no further.
    """
    found = list(islice(values, most + 1))
    if len(found) > most:
        raise RequestError(f"{name} may hold {most:,} entries at most: give fewer.")
    return found

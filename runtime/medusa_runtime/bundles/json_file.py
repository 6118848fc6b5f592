"""Reads JSON from untrusted files: checks it against a schema, in bounded memory.

A schema is a type that msgspec knows: a dataclass or a ``Struct`` whose fields carry their bounds. Keys that the
schema doesn't name are skipped, so that files of newer versions can still be read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from medusa_runtime.errors import BundleError, MedusaError

T = TypeVar("T")

# Values in one file. A value of any type takes at most about 100 bytes of memory.
MAX_VALUES = 500_000

# A short text, such as the name of a model or a version.
Name = Annotated[str, Meta(max_length=1024)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Share = Annotated[float, Meta(ge=0, le=1)]

_LONGEST = 300  # characters that a message quotes
_PLACE = re.compile(r"^(.*?)(?: - at `\$\.?(.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*)`$")


def parse_json(
    data: bytes,
    kind: type[T],
    where: Path | str,
    *,
    remedy: str,
    error: type[MedusaError] = BundleError,
    max_values: int = MAX_VALUES,
) -> T:
    """Parses a JSON text and checks it against a schema.

    Args:
        data: The text, as UTF-8.
        kind: The schema.
        where: Name of the text's source, for messages.
        remedy: A sentence for messages that says what to do about a damaged text.
        error: The type of exception to raise.
        max_values: The most values that are read.

    Raises:
        MedusaError: As ``error``: the text is not JSON, does not follow the schema, or holds too many values.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > max_values:
        raise error(f"{where} holds more than the {max_values:,} values that are read. {remedy}")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as e:
        raise error(f"In {where}, {brief(_complaint(str(e)))}. {remedy}") from e
    except RecursionError as e:
        raise error(f"{where} is nested too deeply. {remedy}") from e
    except ValueError as e:  # msgspec's own errors, and invalid UTF-8
        raise error(f"{where} is not valid JSON ({brief(e)}). {remedy}") from e


def brief(value: object) -> str:
    """An untrusted text in a form that fits a message: printable, and at most 300 characters long."""
    text = str(value)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}"
    return text if text.isprintable() else ascii(text)[1:-1]


def _complaint(text: str) -> str:
    """msgspec's message with the key moved to its front: ``'model.num_layers': expected `int`, got `str```."""
    found = _PLACE.match(text)
    what, place = found.groups() if found else (text, None)
    if missing := _MISSING.match(what):
        return f"{'.'.join(filter(None, (place, missing[1])))!r} is missing"
    what = what[:1].lower() + what[1:]
    return f"{place!r}: {what}" if place else f"the outermost value: {what}"

"""JSON from files that anybody may have written: held against a schema, in bounded memory.

A schema is a type that msgspec knows: a dataclass or a ``Struct`` whose fields carry their bounds. Keys that a schema
doesn't name are skipped, so that files of newer versions can still be read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from medusa_runtime.errors import BundleError, MedusaError

T = TypeVar("T")

# Values in one file. Each takes about 100 bytes of memory at most, whatever it is.
MAX_VALUES = 500_000

# Text that names something: a model, a version, a kind.
Name = Annotated[str, Meta(max_length=1024)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Share = Annotated[float, Meta(ge=0, le=1)]

_LONGEST = 300  # characters of what a message quotes
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
    """The value in a JSON text.

    Args:
        data: The text, as UTF-8.
        kind: The schema.
        where: Where the text comes from, for messages.
        remedy: What to do about a damaged text, for messages.
        error: The exception to raise.
        max_values: The number of values that are read at most.

    Raises:
        MedusaError: ``error``. The text is no JSON, it does not follow the schema, or it holds too many values.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > max_values:
        raise error(f"{where} holds more than the {max_values:,} values that are read. {remedy}")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as e:
        raise error(f"In {where}, {brief(_complaint(str(e)))}. {remedy}") from e
    except RecursionError as e:
        raise error(f"{where} is nested too deeply. {remedy}") from e
    except ValueError as e:  # msgspec's own errors, and bytes that are no UTF-8
        raise error(f"{where} is not valid JSON ({brief(e)}). {remedy}") from e


def brief(value: object) -> str:
    """Text that others wrote, as it can stand in a message: printable, and of a bearable length."""
    text = str(value)
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 :]}"
    return text if text.isprintable() else ascii(text)[1:-1]


def _complaint(text: str) -> str:
    """msgspec's message with the key in front: ``'model.num_layers': expected `int`, got `str```."""
    found = _PLACE.match(text)
    what, place = found.groups() if found else (text, None)
    if missing := _MISSING.match(what):
        return f"{'.'.join(filter(None, (place, missing[1])))!r} is missing"
    what = what[:1].lower() + what[1:]
    return f"{place!r}: {what}" if place else f"the outermost value: {what}"

"""Settings of a server, read from the names and values that other servers hand on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from medusa_runtime.server.settings import SettingError

T = TypeVar("T")

_LISTS = ("model_names", "api_keys", "cors_origins")


def names_of(kind: type[Any]) -> set[str]:
    """Names of a dataclass's fields."""
    return {field.name for field in dataclasses.fields(kind)}


def read_fields(kind: type[T], given: Mapping[str, object]) -> T:
    """Makes an object of a dataclass.

    Args:
        kind: The dataclass.
        given: Values of its fields by name, as text or in their own type. Lists may be text with commas.

    Raises:
        SettingError: A value can't be used.
    """
    values = {name: _parts(value) if name in _LISTS else value for name, value in given.items()}
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        raise SettingError(f"`{wrong['loc'][0]}` is {wrong['input']!r}: {wrong['msg']}.") from error


def _parts(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

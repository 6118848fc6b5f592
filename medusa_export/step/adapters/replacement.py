"""Attributes of objects that are replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Replacement(NamedTuple):
    """An attribute of an object, and its value while a model runs in a step.

    Attributes:
        owner: A module of a model, or a Python module.
        name: The name of the attribute.
        value: The value.
    """

    owner: Any
    name: str
    value: object


@contextmanager
def replaced(replacement: Replacement) -> Iterator[None]:
    """Sets an attribute of an instance while the block lasts."""
    own, name = vars(replacement.owner), replacement.name
    before = own.get(name)
    existed = name in own
    own[name] = replacement.value
    try:
        yield
    finally:
        if existed:
            own[name] = before
        else:
            del own[name]

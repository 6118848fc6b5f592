"""A registry: the members of one kind of extension, by name."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Generic, TypeVar

from medusa_export.common.errors import ExtensionError

T = TypeVar("T")


class Registry(Generic[T]):
    """The members of one kind of extension, by name.

    A member is registered by a call of ``register``, or by an installed package that declares an entry point. An
    entry point is loaded when its name is asked for.

    Args:
        kind: The name of a member in messages, such as "acceptance rule".
        group: The group of entry points, such as "medusa_export.acceptance_rules".
    """

    def __init__(self, kind: str, group: str) -> None:
        self._kind = kind
        self._group = group
        self._members: dict[str, T] = {}

    def register(self, name: str, member: T) -> T:
        """Adds a member.

        Raises:
            ExtensionError: Another member has that name.
        """
        if self._members.setdefault(name, member) is not member:
            raise ExtensionError(f"There is already {_with_article(self._kind)} named {name!r}: choose another name.")
        return member

    @property
    def names(self) -> list[str]:
        """The names of all members, registered or installed."""
        return sorted({*self._members, *entry_points(group=self._group).names})

    def get(self, name: str) -> T:
        """The member of a name.

        Raises:
            ExtensionError: There is none, or its package can't be loaded.
        """
        if name not in self._members:
            found = list(entry_points(group=self._group, name=name))
            if not found:
                raise ExtensionError(
                    f"There is no {self._kind} named {name!r}; there are: {', '.join(self.names)}. Import the module "
                    f"that registers it, or install a package with an entry point {name!r} in {self._group!r}."
                )
            try:
                member: T = found[0].load()
            except Exception as error:
                raise ExtensionError(
                    f"The {self._kind} {name!r} can't be loaded from {found[0].value}: {type(error).__name__}: {error}."
                ) from error
            self._members.setdefault(name, member)
        return self._members[name]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"

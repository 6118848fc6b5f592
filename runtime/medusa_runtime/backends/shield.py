"""Makes all failures of a backend ``BackendError``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from medusa_runtime.backends.base import Backend
from medusa_runtime.errors import BackendError, MedusaError

_B = TypeVar("_B", bound=Backend)


class _Shield:
    """Passes calls and attributes on to a backend; their exceptions become ``BackendError``."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        with _typed(name):
            value = getattr(self._backend, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            with _typed(name):
                return value(*arguments, **options)

        return call


@contextmanager
def _typed(name: str) -> Iterator[None]:
    try:
        yield
    except MedusaError:
        raise
    except AttributeError as error:
        if error.name == name:  # a capability that the backend doesn't have
            raise
        raise BackendError(f"The backend failed in {name}: {error!r}.") from error
    except Exception as error:
        raise BackendError(f"The backend failed in {name}: {error!r}.") from error


def shielded(backend: _B) -> _B:
    """The same backend, which raises nothing but ``MedusaError``."""
    return cast("_B", _Shield(backend))

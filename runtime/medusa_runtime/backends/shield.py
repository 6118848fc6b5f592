"""Makes all failures of a backend ``BackendError``."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from medusa_runtime.backends.base import Backend
from medusa_runtime.errors import BackendError, MedusaError

_B = TypeVar("_B", bound=Backend)


class _Shield:
    """Passes calls and attributes on to a backend; their exceptions become ``BackendError``."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        try:
            value = getattr(self._backend, name)
        except MedusaError:
            raise
        except Exception as error:
            if isinstance(error, AttributeError) and error.name == name:  # a capability that the backend doesn't have
                raise
            raise _failure(name, error) from error
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return value(*arguments, **options)
            except MedusaError:
                raise
            except Exception as error:
                raise _failure(name, error) from error

        return call


def _failure(name: str, error: Exception) -> BackendError:
    return BackendError(f"The backend failed in {name}: {error!r}.")


def shielded(backend: _B) -> _B:
    """The same backend, which raises nothing but ``MedusaError``."""
    return cast("_B", _Shield(backend))

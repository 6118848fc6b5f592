"""Optional packages, by the extra that installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from medusa_export.common.errors import MissingExtraError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Surrounds imports of optional packages; a package that is missing becomes an error that names the extra.

    Args:
        name: The extra of ``medusa-export`` that installs the packages.

    Raises:
        MissingExtraError: A package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name or ""
        if package.split(".")[0] in ("medusa_export", "medusa_runtime"):
            raise
        raise MissingExtraError(package, name) from error

"""Extensions: installed packages that register weight formats, rewrites and the like when they are imported.

A package declares the module to import as an entry point of the group ``medusa_export.extensions``.
"""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

from medusa_export.common.errors import ExtensionError, first_line

GROUP = "medusa_export.extensions"


@functools.cache
def load_extensions() -> None:
    """Imports all extensions, once per process.

    Raises:
        ExtensionError: One of them can't be imported.
    """
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # an extension is any code
            raise ExtensionError(
                f"The extension {entry.name} ({entry.value}) can't be imported ({first_line(error)}): mend or remove "
                "the package that declares it."
            ) from error

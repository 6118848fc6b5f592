"""Child processes that find torch and transformers imported: the imports take longer than what most of them do.

They are forks of a process that has imported both, and has run nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

_SERVER = get_context("forkserver")
_SERVER.set_forkserver_preload(["medusa_export.training.train", "medusa_export.training.distill"])


def started(
    function: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Starts a process that calls a function of a module.

    Args:
        function: The function.
        arguments: Its arguments.
        environment: Further variables of the process's environment.
    """
    process = _SERVER.Process(target=_call, args=(dict(environment or {}), function, arguments), daemon=True)
    process.start()
    return process


def run_command(arguments: list[str]) -> None:
    """Runs ``medusa-export``."""
    from medusa_export.cli import main

    main(arguments)


def _call(environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    function(*arguments)

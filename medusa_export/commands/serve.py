"""``medusa-export serve``: serve a bundle over HTTP with OpenAI's API."""

from __future__ import annotations

from medusa_export.commands.command import Command
from medusa_runtime.server.cli import command as served

command = Command(
    "serve",
    params=served.params,
    callback=served.callback,
    help=served.help,
)

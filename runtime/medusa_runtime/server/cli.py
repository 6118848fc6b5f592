"""The command line of the server: ``python -m medusa_runtime.server BUNDLE``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from medusa_runtime.common.cpus import limit_openmp_threads
from medusa_runtime.errors import MedusaError

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(1)
_SECONDS = click.FloatRange(0)


@click.command("serve", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("bundle", type=_PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="The port to listen on.")
@click.option(
    "--processes",
    type=_COUNT,
    default=1,
    show_default=True,
    help="Servers to run, each on a port of its own from --port.",
)
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    help="The backend that runs the bundle, such as onnxruntime, onnxruntime-cuda or tensorrt-rtx.",
)
@click.option("--rows", type=_COUNT, default=4, show_default=True, help="Requests that run at a time.")
@click.option("--threads", type=_COUNT, help="CPU threads of a step. [default: the CPUs that each process may use]")
@click.option(
    "--device",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of the GPU that runs a compiled engine.",
)
@click.option(
    "--gpu-memory",
    type=float,
    help="GPU memory that a compiled engine may use, in bytes, or as a fraction up to 1. [default: all]",
)
@click.option(
    "--max-queue",
    type=click.IntRange(0),
    default=256,
    show_default=True,
    help="Requests that may wait for a row. Further ones are refused.",
)
@click.option(
    "--model-name",
    "model_names",
    multiple=True,
    help="A name of the model in the API. May be given more than once. [default: the folder's name]",
)
@click.option("--api-key-file", type=_PATH, help="A file of API keys, one a line. MEDUSA_API_KEYS holds further ones.")
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    help="An origin whose web pages may use the server, or * for all. May be given more than once.",
)
@click.option("--max-body", type=_COUNT, default=2**20, show_default=True, help="The most bytes of a request's body.")
@click.option("--max-prompt-tokens", type=_COUNT, help="The most tokens of a prompt. [default: what the model holds]")
@click.option(
    "--max-client-requests", type=_COUNT, help="Answers that one client may wait for at a time. [default: no limit]"
)
@click.option(
    "--request-seconds", type=_SECONDS, help="Seconds after which a request ends with an error. [default: no limit]"
)
@click.option(
    "--drain-seconds",
    type=_SECONDS,
    default=30.0,
    show_default=True,
    help="Seconds that requests may take to end after SIGTERM.",
)
@click.option(
    "--keep-alive-seconds",
    type=_SECONDS,
    default=10.0,
    show_default=True,
    help="Seconds without text after which a stream gets a comment, so that the connection stays open.",
)
@click.option(
    "--tool-format",
    default="auto",
    show_default=True,
    help="Format of tool calls: auto (that of the chat template), none, or a name such as hermes.",
)
@click.option(
    "--reasoning-format",
    type=click.Choice(["auto", "think", "none"]),
    default="auto",
    show_default=True,
    help="Format of reasoning: auto (that of the chat template), think (<think> tags) or none.",
)
@click.option("--otlp-endpoint", metavar="URL", help="The OpenTelemetry collector that gets a span per request.")
@click.option(
    "--log-level",
    default="info",
    show_default=True,
    help="The lowest level that is logged: debug, info, warning or error.",
)
def command(
    host: str,
    port: int,
    processes: int,
    api_key_file: Path | None,
    log_level: str,
    threads: int | None,
    **options: Any,
) -> None:
    """Serve BUNDLE over HTTP with OpenAI's API.

    BUNDLE is the folder that 'medusa-export onnx' or 'medusa-export trt' wrote.
    """
    try:
        from medusa_runtime.server.logs import set_up_logs
        from medusa_runtime.server.run import serve, supervise, threads_of_each
        from medusa_runtime.server.settings import Settings
    except ImportError as error:
        message = f"{error}. Install the server with: pip install 'medusa-export[server]'."
        raise click.ClickException(message) from error
    if log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise click.BadParameter(f"{log_level!r} is no level: use debug, info, warning or error.")
    limit_openmp_threads(os.environ)
    given: dict[str, Any] = options | {"threads": threads_of_each(processes, threads)}
    settings = Settings(api_keys=_api_keys(api_key_file), **given)
    if processes > 1:
        sys.exit(supervise(settings, host=host, port=port, processes=processes, log_level=log_level))
    set_up_logs(log_level)
    serve(settings, host=host, port=port)


def _api_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file and in the environment."""
    text = os.environ.get("MEDUSA_API_KEYS", "").replace(",", "\n")
    if path is not None:
        try:
            text += "\n" + path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.ClickException(f"The API keys in {path} can't be read: {error}.") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def main() -> None:
    """Runs the command, and shows errors in a sentence."""
    try:
        command()
    except MedusaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)

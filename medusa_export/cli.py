"""The command line. Each command imports its packages when it runs, so that help is instant and needs no torch."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import click

from medusa_export.commands.command import Failure
from medusa_runtime import __version__
from medusa_runtime.common.cpus import limit_openmp_threads

COMMANDS = {
    "onnx": "Compile a model with MEDUSA heads to an ONNX bundle.",
    "trt": "Compile a bundle to a TensorRT engine.",
    "generate": "Answer a prompt with a bundle.",
    "serve": "Serve a bundle over HTTP with OpenAI's API.",
    "triton": "Write a model of Triton Inference Server that answers with a bundle.",
    "inspect": "Show what is in a bundle.",
    "verify": "Check a bundle against PyTorch.",
    "distill": "Have a model write training data for its heads.",
    "train": "Train heads on conversations.",
    "calibrate": "Measure how often heads are right.",
    "heads": "Work with files of heads.",
    "tree": "Search the best draft tree for calibrated heads.",
    "quantize": "Round the weights of a model with GPTQ.",
    "activations": "Measure the ranges of a model's activations.",
    "quality": "Measure what quantization costs.",
    "bench": "Measure decoding speed.",
}


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """While the block lasts, SIGTERM raises ``SystemExit``, so that files that are not whole are removed."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Commands(click.Group):
    """Loads a command's module when the command is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f"medusa_export.commands.{name}").command
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, context: click.Context) -> object:
        limit_openmp_threads(os.environ)  # before a command imports torch
        try:
            with _ended_in_order():
                return super().invoke(context)
        except OSError as error:
            if error.errno == errno.EPIPE:  # click ends quietly
                raise
            raise Failure(f"{error}.") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="medusa-export")
def main() -> None:
    """Compile language models with MEDUSA heads, and decode with them losslessly."""

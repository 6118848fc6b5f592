"""Commands that are interrupted while they work."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence


def interrupt(command: Sequence[str], at: Sequence[str], *, by: signal.Signals = signal.SIGINT) -> tuple[int, str]:
    """Sends a command the signal ``by`` at the first line on stderr that holds one of ``at``.

    Returns:
        Its exit code, and what it wrote to stderr after that line.
    """
    # Where the tests run in the background, a shell has them ignore the signal, and children inherit that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from medusa_export.cli import main; main(prog_name='medusa-export')"
    )
    with subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if any(words in line for words in at):
                process.send_signal(by)
                break
        errors = process.stderr.read()
        process.wait(60)
    return process.returncode, errors

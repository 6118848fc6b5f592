"""Identifiers of requests, answers and calls, which need not be secret."""

from __future__ import annotations

import os
import random

_RANDOM = random.Random()  # noqa: S311
if hasattr(os, "register_at_fork"):  # else children would make the same ones as their parent
    os.register_at_fork(after_in_child=_RANDOM.seed)


def random_hex(digits: int) -> str:
    """Random hexadecimal digits.

    ``secrets`` would make a system call, at which Python's lock goes to another thread. The event loop then waits.
    """
    return f"{_RANDOM.getrandbits(4 * digits):0{digits}x}"

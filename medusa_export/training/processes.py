"""The processes of a training: one, or several that ``accelerate launch`` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

# The other processes wait for the first one while it computes hidden states.
_PATIENCE = timedelta(days=2)


class Processes:
    """The processes of a job, as seen by one of them.

    Args:
        device: ``cpu`` or ``cuda``, for a job of one process. None lets accelerate choose.
    """

    def __init__(self, device: str | None) -> None:
        # cpu=True is needed without a GPU: otherwise several processes don't connect before the Trainer starts.
        self._state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
        self.device = torch.device(device) if device else self._state.device

    @property
    def is_main(self) -> bool:
        """True in the process that writes files."""
        return bool(self._state.is_main_process)

    @property
    def count(self) -> int:
        """Number of processes."""
        return int(self._state.num_processes)

    @property
    def on_this_machine(self) -> int:
        """Number of processes on this machine, which share its memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def agreed(self, value: bool) -> bool:
        """The main process's value, in all processes. All processes must call it."""
        return bool(broadcast_object_list([value])[0])

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A context manager: the other processes enter the block when the main process has left it.

        So they find the main process's files on disk.
        """
        with self._state.main_process_first():
            yield

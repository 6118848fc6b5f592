"""Where a training runs: on one device, or on those that ``accelerate launch`` started it on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

# Others wait for the first process while it computes hidden states.
_PATIENCE = timedelta(days=2)


class Processes:
    """The processes of a job.

    Args:
        device: ``cpu`` or ``cuda``, for a job of one process; its own choice if None.
    """

    def __init__(self, device: str | None) -> None:
        # Without a GPU it must be told so, or else several processes don't find each other until the Trainer starts.
        self._state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
        self.device = torch.device(device) if device else self._state.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return bool(self._state.is_main_process)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._state.num_processes)

    @property
    def on_this_machine(self) -> int:
        """How many of them share its memory."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def agreed(self, value: bool) -> bool:
        """The main process's, for all; each must ask."""
        return bool(broadcast_object_list([value])[0])

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others begin when the main process is done, and find what it left on disk."""
        with self._state.main_process_first():
            yield

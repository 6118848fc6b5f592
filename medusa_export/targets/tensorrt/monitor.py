"""Progress of a build, and its interruption."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
# Receives the finished share of a build, from 0 to 1.
OnFraction = Callable[[float], None]


def build_monitor(trt: Any, on_fraction: OnFraction) -> Any:
    """Makes a progress monitor for a builder. Its ``cancel()`` ends the build.

    Args:
        trt: TensorRT's Python module.
        on_fraction: Receives the finished share of the build.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its base class is known only at run time
        def __init__(self) -> None:
            super().__init__()
            self._phases: dict[str, list[int]] = {}  # steps and finished steps, the outermost first
            self._cancelled = False
            self._reached = 0.0

        def cancel(self) -> None:
            self._cancelled = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [max(num_steps, 1), 0]

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name][1] = step + 1
            done, share = 0.0, 1.0
            for steps, finished in self._phases.values():
                done += share * min(finished / steps, 1.0)
                share /= steps
            self._reached = max(self._reached, min(done, 1.0))
            on_fraction(self._reached)
            return not self._cancelled

    return Monitor()


def in_thread(work: Callable[[], T], cancel: Callable[[], None]) -> T:
    """Runs ``work`` in a thread, so that an interrupt reaches this one.

    Args:
        work: The function to run.
        cancel: Makes ``work`` return early. It is called on an interrupt.

    Returns:
        The result of ``work``.

    Raises:
        KeyboardInterrupt: It was interrupted; ``work`` has ended.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001  # raised again below
            failure.append(error)

    thread = threading.Thread(target=run, name="tensorrt-builder")
    thread.start()
    interrupted: KeyboardInterrupt | None = None
    while thread.is_alive():
        try:
            thread.join(0.2)
        except KeyboardInterrupt as error:
            cancel()
            interrupted = error
    if interrupted is not None:
        raise interrupted
    if failure:
        raise failure[0]
    return outcome[0]

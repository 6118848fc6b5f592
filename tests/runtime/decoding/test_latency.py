"""Measured step times: on a busy machine, and of sizes that are too slow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pytest

from medusa_runtime import Bundle
from medusa_runtime.decoding import latency
from medusa_runtime.tuning import FEWEST_ROUNDS, MOST_ROUNDS, WARM_UP


class Machine:
    """A clock, and steps that move it on: by a second for a plain step, and by more per further token."""

    max_tokens = None

    def __init__(self, per_token: float, busy: Sequence[float]) -> None:
        self.now = 0.0
        self.steps: list[int] = []
        self._per_token = per_token
        self._busy = busy
        self._round = -1
        self._hangover = 0.0  # extra time of the step after one of many tokens

    def reserve(self, capacity: int) -> None:
        """Has room for any capacity."""

    def reset(self, row: int) -> None:
        """Does nothing: rows hold no entries."""

    def step(self, size: int, prompts: Mapping[int, Sequence[int]], rows: Sequence[int]) -> None:
        if prompts:
            self._round += 1
        else:
            self.steps.append(size)
            self.now += self._busy[self._round % len(self._busy)] * (1 + self._per_token * (size - 1) + self._hangover)
        self._hangover = 5.0 if prompts else 0.0

    def table(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: self.now))
        return latency._measure(bundle, self, rows=2)


def test_a_machine_that_slows_down_changes_no_ratio(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for busy in ([1], [1, 1, 1, 4, 4, 1, 1, 1, 1], [1, 1, 4, 4, 4]):
        table = Machine(0.1, busy).table(tiny_bundle, monkeypatch)
        assert {size: seconds / table["1"] for size, seconds in table.items()} == pytest.approx(
            {size: 1 + 0.1 * (int(size) - 1) for size in ("1", "2", "3", "4", "6", "8", "9")}
        )


def test_sizes_that_are_too_slow_are_left_out(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0, [0.01])
    table = machine.table(tiny_bundle, monkeypatch)
    assert list(table) == ["1", "2", "3"]
    assert machine.steps.count(9) == WARM_UP  # not after it
    assert table["1"] == pytest.approx(0.01)


def test_a_slow_machine_is_not_measured_for_long(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Machine(0.1, [2.0]), Machine(0.1, [0.01])
    slow.table(tiny_bundle, monkeypatch)
    fast.table(tiny_bundle, monkeypatch)
    assert slow.steps.count(2) == FEWEST_ROUNDS
    assert fast.steps.count(2) == MOST_ROUNDS

"""The kinds of backends that tests of a service run over: ONNX Runtime on the CPU, and TensorRT on the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from medusa_runtime import Bundle
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.compiled import EngineLimits
from support.gate import AnyGate, Gate
from support.machine import Machine, stand_in_engine

CPU = "cpu"
KINDS = (CPU, "stand-in-4", pytest.param("stand-in-8", marks=pytest.mark.exhaustive))
MOST_PREFILL = 64


class Rig:
    """Opens backends of one kind. What they leave on a stand-in is an error.

    Args:
        kind: ``cpu``, or ``stand-in-`` and the number of rows.
        bundle: The bundle that the backends run.
        folder: A folder for the stand-in's engine.

    Attributes:
        rows: The number of rows.
    """

    def __init__(self, kind: str, bundle: Bundle, folder: Path) -> None:
        self.is_cpu = kind == CPU
        self.rows = 2 if self.is_cpu else int(kind.rpartition("-")[2])
        self._bundle = bundle
        if not self.is_cpu:
            capacity = bundle.slots.sequence_capacity(bundle.model.max_positions, bundle.tree.size)
            self._engine = stand_in_engine(bundle, folder, EngineLimits(self.rows, capacity, MOST_PREFILL))
        self._machines: list[Machine] = []

    def backend(self) -> Any:
        """A new backend."""
        if self.is_cpu:
            return OnnxRuntimeBackend(self._bundle, rows=self.rows, threads=1)
        self._machines.append(Machine(self._bundle, self._engine, eagerness=0.05))
        return self._machines[-1].backend(self.rows)

    def gate(self) -> AnyGate:
        """A new backend whose steps a test can delay."""
        return Gate(self._bundle, self.rows) if self.is_cpu else AnyGate(self.backend())

    def check(self) -> None:
        """Checks that all backends were closed in order."""
        for machine in self._machines:
            assert not machine.left


@contextmanager
def rig_of(kind: str, bundle: Bundle, folder: Path) -> Iterator[Rig]:
    """A context manager with a rig, which is checked afterwards."""
    rig = Rig(kind, bundle, folder)
    yield rig
    rig.check()

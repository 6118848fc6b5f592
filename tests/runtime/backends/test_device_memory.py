"""The memory of an engine on a GPU: computed, reported, and bounded."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from medusa_runtime import BackendError, Bundle, MedusaService, OutOfDeviceMemoryError, RequestError
from medusa_runtime.backends import open_backend
from medusa_runtime.backends.tensorrt.backend import TensorRTBackend
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.backends.tensorrt.memory import DeviceMemory
from medusa_runtime.bundles.compiled import EngineLimits
from support.machine import Machine, stand_in_engine

MOST = 8


@pytest.fixture
def machine(tiny_bundle: Bundle, tmp_path: Path) -> Machine:
    return Machine(tiny_bundle, stand_in_engine(tiny_bundle, tmp_path, EngineLimits(MOST, 128, 16)))


def open_with(machine: Machine, gpu_memory: float, rows: int = MOST) -> TensorRTBackend:
    return TensorRTBackend(
        machine.bundle,
        machine.description,
        rows=rows,
        library=machine.library,
        cuda=Cuda(machine.cuda),
        gpu_memory=gpu_memory,
    )


@pytest.mark.parametrize("rows", [1, 3, MOST])
def test_what_is_computed_is_what_is_taken(machine: Machine, caplog: pytest.LogCaptureFixture, rows: int) -> None:
    """But for the rounding of addresses. It is said before it is taken."""
    memory = DeviceMemory.of(machine.bundle, machine.description, scratch=2000)
    with caplog.at_level(logging.INFO):
        backend = machine.backend(rows)
    computed = memory.total(rows)
    assert computed <= machine.cuda.used <= computed + 256 * 8
    assert f"a stand-in takes {memory.words(rows)}" in caplog.text
    backend.close()
    assert not machine.left
    heads, size = machine.bundle.states[0].shape
    assert memory.caches == len(machine.bundle.states) * heads * size * 128 * 4


def test_as_many_rows_as_fit(machine: Machine) -> None:
    memory = DeviceMemory.of(machine.bundle, machine.description, scratch=2000)
    machine.cuda.memory_limit = 2**30
    assert open_with(machine, memory.total(5)).rows == 5
    assert open_with(machine, memory.total(6) - 1).rows == 5
    assert open_with(machine, memory.total(6) - 1, rows=2).rows == 2
    assert open_with(machine, memory.total(3) / machine.cuda.memory_limit + 1e-9).rows == 3
    assert open_with(machine, 1.0).rows == MOST
    with pytest.raises(OutOfDeviceMemoryError, match=r"One row takes .* MiB.*a stand-in has 1,024 MiB.*several GPUs"):
        open_with(machine, memory.total(1) - 1)
    for wrong in (0, -1, float("nan"), float("inf"), True, "1"):
        with pytest.raises(RequestError, match="gpu_memory is"):
            open_with(machine, wrong)


def test_an_engine_that_is_too_large_is_refused_before_it_is_loaded(machine: Machine) -> None:
    loaded: list[bytes] = []
    runtime = machine.trt.Runtime
    machine.trt.Runtime = lambda log: (loaded.append(b""), runtime(log))[1]
    with machine.description.engine.open("r+b") as file:
        file.truncate(3 * 2**30)  # it takes no space on disk
    with pytest.raises(OutOfDeviceMemoryError, match=r"3,072 of weights.*--weights int4.*can't be split over several"):
        machine.backend()
    assert not loaded


def test_a_service_has_the_rows_that_fit(machine: Machine) -> None:
    memory = DeviceMemory.of(machine.bundle, machine.description, scratch=2000)
    with MedusaService(machine.bundle, open_with(machine, memory.total(2)), None, tree_size=4) as service:
        handles = [service.submit([5 + number] * 9, max_new_tokens=5) for number in range(6)]
        assert all(handle.result(30).finish_reason == "length" for handle in handles)
        assert service._thread.scheduler.rows == 2


@pytest.mark.parametrize("options", [{"device": 1}, {"gpu_memory": 0.5}])
@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-cuda"])
def test_backends_without_a_choice_of_memory_refuse_one(tiny_bundle: Bundle, name: str, options: dict) -> None:
    with pytest.raises(BackendError, match="leave device and gpu_memory out"):
        open_backend(name, tiny_bundle, **options)


def test_a_third_of_an_engine(machine: Machine) -> None:
    """The limits of an engine decide about a row, not the rows that it was built for."""
    fewer = replace(machine.description, limits=replace(machine.description.limits, max_batch=1))
    one, other = (DeviceMemory.of(machine.bundle, engine) for engine in (fewer, machine.description))
    assert one == other

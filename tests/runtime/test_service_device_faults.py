"""A service on the stand-in for a GPU, any of whose calls may fail: right answers or typed errors, and no leaks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medusa_runtime import (
    BackendError,
    Bundle,
    DeviceLostError,
    MedusaEngine,
    MedusaService,
    OutOfDeviceMemoryError,
    SamplingParams,
    ServiceClosedError,
)
from medusa_runtime.bundles.compiled import CompiledEngine, EngineLimits
from support.machine import Machine, stand_in_engine
from support.stand_in_cuda import cudaError_t

ROWS = 4
SHARED = [(11 * i + 1) % 100 + 1 for i in range(40)]
PROMPTS = [[*SHARED, *range(1, 5 + number)] for number in range(3)] + [[7, 9, 11], [5] * 30]
OPTIONS = {"max_new_tokens": 12}
OTHER = cudaError_t.cudaErrorInvalidValue
# CUDA functions of which a service calls each at some time while it answers.
CUDA_CALLS = (
    "cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaMemsetAsync", "cudaStreamSynchronize", "cudaEventRecord",
    "cudaEventSynchronize", "cudaGraphLaunch", "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate",
    "cudaGraphDestroy",
)  # fmt: skip
TENSORRT_CALLS = (
    "create_execution_context", "set_optimization_profile_async", "set_input_shape", "set_tensor_address",
    "execute_async_v3",
)  # fmt: skip


@pytest.fixture(scope="module")
def description(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> CompiledEngine:
    return stand_in_engine(tiny_bundle, tmp_path_factory.mktemp("engine"), EngineLimits(ROWS, 128, 16))


@pytest.fixture(scope="module")
def expected(tiny_bundle: Bundle) -> list[tuple[int, ...]]:
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        return [engine.generate(prompt, **OPTIONS).token_ids for prompt in PROMPTS]


@pytest.fixture
def machine(tiny_bundle: Bundle, description: CompiledEngine) -> Iterator[Machine]:
    machine = Machine(tiny_bundle, description)
    yield machine
    assert not machine.left


def answered(service: MedusaService, expected: list[tuple[int, ...]]) -> int:
    """Asks all prompts at once. Each gets its right answer or a typed error; gives the number of answers."""
    handles = [service.submit(prompt, **OPTIONS) for prompt in PROMPTS]
    count = 0
    for handle, tokens in zip(handles, expected, strict=True):
        try:
            assert handle.result(60).token_ids == tokens
            count += 1
        except BackendError:
            assert list(tokens[: handle.stats.completion_tokens]) == [
                token for chunk in _chunks(handle) for token in chunk.token_ids
            ]
    return count


def _chunks(handle: Iterator) -> Iterator:
    try:
        yield from handle
    except BackendError:
        return


def every(count: int, name: str, outcome: object) -> Callable[[str], object]:
    """A fault in every ``count``-th call of a function."""
    numbers = itertools.count(1)
    return lambda function: outcome if function == name and not next(numbers) % count else None


@pytest.mark.slow
@pytest.mark.parametrize("name", CUDA_CALLS)
def test_a_call_of_cuda_that_fails_now_and_then(
    tiny_bundle: Bundle, machine: Machine, expected: list[tuple[int, ...]], name: str
) -> None:
    with MedusaService(tiny_bundle, machine.backend(ROWS), None, tree_size=4, prefill_chunk=8) as service:
        for count in (1, 2, 7, 31):
            machine.cuda.fault = every(count, name, OTHER)
            answered(service, expected)
        machine.cuda.fault = lambda _: None
        assert service.state == "ready"
        assert answered(service, expected) == len(PROMPTS)
    if name == "cudaGraphDestroy":  # what can't be given back is left
        machine.cuda.graphs.clear()


@pytest.mark.slow
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("name", TENSORRT_CALLS)
def test_a_call_of_tensorrt_that_fails_now_and_then(
    tiny_bundle: Bundle, machine: Machine, expected: list[tuple[int, ...]], name: str, raises: bool
) -> None:
    machine.trt.raises = raises
    with MedusaService(tiny_bundle, machine.backend(ROWS), None, tree_size=4, prefill_chunk=8) as service:
        for count in (1, 2, 7):
            machine.trt.fault = every(count, name, "no such tactic")
            answered(service, expected)
        machine.trt.fault = lambda _: None
        assert service.state == "ready"
        assert answered(service, expected) == len(PROMPTS)


def test_each_call_fails_once(tiny_bundle: Bundle, machine: Machine, expected: list[tuple[int, ...]]) -> None:
    """Whichever call of CUDA fails first in a busy service, all later answers are right."""
    with MedusaService(tiny_bundle, machine.backend(ROWS), None, tree_size=9, prefill_chunk=8) as service:
        assert answered(service, expected) == len(PROMPTS)
        for place in range(0, 60, 3):
            numbers = itertools.count()
            machine.cuda.fault = lambda _, place=place, numbers=numbers: OTHER if next(numbers) == place else None
            answered(service, expected)
        machine.cuda.fault = lambda _: None
        assert answered(service, expected) == len(PROMPTS)


@pytest.mark.parametrize("name", ["cudaMalloc", "cudaMallocHost", "cudaEventCreateWithFlags", "cudaMemsetAsync"])
def test_memory_that_is_missing_at_any_allocation(machine: Machine, name: str) -> None:
    """Whatever was allocated before is given back."""
    machine.backend(ROWS).close()
    calls = machine.cuda.calls[name]
    assert calls
    for place in range(calls):
        numbers = itertools.count()
        machine.cuda.fault = lambda function, place=place, numbers=numbers: (
            cudaError_t.cudaErrorMemoryAllocation if function == name and next(numbers) == place else None
        )
        with pytest.raises(OutOfDeviceMemoryError, match="no memory for 4 sequences"):
            machine.backend(ROWS)
        assert not machine.left


def test_graphs_give_way_where_memory_is_scarce(
    tiny_bundle: Bundle, description: CompiledEngine, expected: list[tuple[int, ...]]
) -> None:
    """Without memory for a graph per tree size, the one that was used last is kept."""
    machine = Machine(tiny_bundle, description, graph_limit=2)
    with MedusaService(tiny_bundle, machine.backend(ROWS), None, prefill_chunk=8) as service:
        for size in (1, 4, 9, 6, 4):
            service._thread.loop.sizes.tree_size = size
            assert answered(service, expected) == len(PROMPTS)
            assert len(machine.cuda.executables) <= 2
    assert machine.cuda.calls["cudaGraphExecDestroy"] > 3
    assert not machine.left


@pytest.mark.parametrize("raises", [False, True])
def test_contexts_give_way_where_memory_is_scarce(
    tiny_bundle: Bundle, description: CompiledEngine, expected: list[tuple[int, ...]], raises: bool
) -> None:
    machine = Machine(tiny_bundle, description)
    machine.trt.raises = raises
    backend = machine.backend(ROWS)
    machine.trt.context_size, machine.cuda.memory_limit = 2**20, machine.cuda.used + 3 * 2**20 + 2**19
    with MedusaService(tiny_bundle, backend, None, tree_size=1, prefill_chunk=8) as service:
        for size in (1, 4, 9, 6, 4):
            service._thread.loop.sizes.tree_size = size
            assert answered(service, expected) == len(PROMPTS)
            assert machine.cuda.context_bytes < 4 * 2**20
    assert not machine.left


def test_no_more_contexts_than_the_bound(
    tiny_bundle: Bundle, machine: Machine, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_runtime.backends.tensorrt.steps.MOST_CONTEXTS", 2)
    with MedusaService(tiny_bundle, machine.backend(ROWS), None, tree_size=1) as service:
        for size in (1, 4, 9, 4):
            service._thread.loop.sizes.tree_size = size
            assert answered(service, expected) == len(PROMPTS)
        drawn = service.generate(PROMPTS[0], sampling=SamplingParams(seed=1), **OPTIONS)
        assert len(machine.cuda.executables) <= 2
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        assert drawn.token_ids == engine.generate(PROMPTS[0], sampling=SamplingParams(seed=1), **OPTIONS).token_ids


@pytest.mark.parametrize("place", [0, 5, 23])
def test_a_lost_device_ends_the_service(
    tiny_bundle: Bundle, description: CompiledEngine, expected: list[tuple[int, ...]], place: int
) -> None:
    """All requests end, the state is failed, and closing raises nothing."""
    machine = Machine(tiny_bundle, description)
    service = MedusaService(tiny_bundle, machine.backend(ROWS), None, tree_size=4, prefill_chunk=8)
    numbers = itertools.count()
    machine.cuda.fault = lambda _: machine.cuda.lose() if next(numbers) == place else None
    handles = [service.submit(prompt, max_new_tokens=60) for prompt in PROMPTS]
    for handle in handles:
        with pytest.raises(BackendError, match=r"cudaErrorIllegalAddress.*start it again"):
            handle.result(60)
    service._thread.thread.join(30)
    assert service.state == "failed" and isinstance(service.failure, DeviceLostError)
    with pytest.raises(ServiceClosedError, match="has failed: DeviceLostError"):
        service.submit(PROMPTS[0])
    assert service.drain(30)
    service.close()


def test_a_lost_device_ends_the_request_of_an_engine(tiny_bundle: Bundle, description: CompiledEngine) -> None:
    machine = Machine(tiny_bundle, description)
    engine = MedusaEngine(tiny_bundle, machine.backend(), None)
    stream = engine.stream(PROMPTS[0], max_new_tokens=60, tree_size=4)
    next(stream)
    machine.cuda.lose()
    with pytest.raises(DeviceLostError, match="cudaErrorIllegalAddress"):
        list(stream)
    with pytest.raises(DeviceLostError):
        engine.generate(PROMPTS[0], max_new_tokens=5, tree_size=4)


def test_a_thread_chooses_its_gpu(tiny_bundle: Bundle, description: CompiledEngine, tmp_path: Path) -> None:
    machine = Machine(tiny_bundle, description, devices=2)
    with MedusaService(tiny_bundle, machine.backend(ROWS, device=1), None, tree_size=4) as service:
        service.generate(PROMPTS[0], **OPTIONS)
        assert set(machine.cuda.current.values()) == {1} and len(machine.cuda.current) == 2
    with pytest.raises(BackendError, match=r"no GPU 2: CUDA sees 2, which are numbered from 0"):
        machine.backend(ROWS, device=2)

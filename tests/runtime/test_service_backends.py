"""A service on backends that run all rows in each step: on a stand-in for a GPU, and in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from medusa_export.step.eager import EagerBackend
from medusa_runtime import (
    BackendError,
    Bundle,
    DoubtfulRowsError,
    MedusaEngine,
    MedusaService,
    RequestError,
    SamplingParams,
)
from medusa_runtime.backends.base import Backend
from medusa_runtime.backends.tensorrt import backend as backend_module
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.bundles.compiled import CompiledEngine
from support.decoding import TREE
from support.machine import Machine
from support.on_host import OnnxRuntimeOnHost
from support.stand_in_cuda import cudaError_t
from support.stock import Stock

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]
KINDS = ("onnxruntime-cuda", "tensorrt-rtx", "eager")
Opener = Callable[[str], Backend]


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> MedusaEngine:
    return MedusaEngine.load(tiny_bundle.folder, threads=1)


@pytest.fixture
def machine(tiny_bundle: Bundle, tiny_engine: CompiledEngine) -> Machine:
    return Machine(tiny_bundle, tiny_engine)


@pytest.fixture
def opened(tiny_bundle: Bundle, machine: Machine, stock: Stock) -> Opener:
    openers: dict[str, Callable[[], Backend]] = {
        "onnxruntime-cuda": lambda: OnnxRuntimeOnHost(tiny_bundle, rows=3, threads=1),
        "tensorrt-rtx": lambda: machine.backend(3),
        "eager": lambda: EagerBackend(stock.export().step, rows=3),
    }
    return lambda kind: openers[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(9, marks=pytest.mark.slow)])
def test_requests_side_by_side_answer_as_alone(
    tiny_bundle: Bundle, engine: MedusaEngine, opened: Opener, kind: str, size: int
) -> None:
    """Rows that prefill, decode and wait don't affect each other, with shared prefixes and any sampling parameters."""
    rng = np.random.default_rng(size)
    requests: list[tuple[list[int], dict[str, Any]]] = []
    for number in range(16 if kind == "eager" else 30):
        base = requests[int(rng.integers(number))][0] if number and number % 3 else []
        prompt = [*base[:40], *rng.integers(1, 101, rng.integers(1, 30)).tolist()]
        sampling = SamplingParams(temperature=0.8, seed=number) if number % 4 == 1 else None
        options = {"max_new_tokens": int(rng.integers(1, 30)), "lookup": bool(number % 2), "sampling": sampling}
        requests.append((prompt, options))
    with MedusaService(tiny_bundle, opened(kind), None, tree_size=size, prefill_chunk=7) as service:
        handles = [service.submit(prompt, **options) for prompt, options in requests]
        for (prompt, options), handle in zip(requests, handles, strict=True):
            assert handle.result(60).token_ids == engine.generate(prompt, tree_size=4, **options).token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_one_table_of_step_times_for_all_rows(tiny_bundle: Bundle, opened: Opener, kind: str) -> None:
    with MedusaService(tiny_bundle, opened(kind), None) as service:
        assert set(service._thread.loop.sizes.choice.sizes) == {3}
        assert len(service.generate(PROMPT, max_new_tokens=12).token_ids) == 12


def watched(backend: Backend) -> list[tuple[int, list[int], list[int]]]:
    """The size, the rows with prompts and the other rows of each step, from now on."""
    steps: list[tuple[int, list[int], list[int]]] = []
    step = backend.step

    def noted(size: int, prompts: Any = None, rows: Any = None) -> Any:
        steps.append((size, sorted(prompts or ()), sorted({*rows} - {*(prompts or ())})))
        return step(size, prompts, rows)

    backend.step = noted  # type: ignore[method-assign]
    return steps


@pytest.mark.parametrize("kind", ["onnxruntime-cuda", "tensorrt-rtx"])
def test_prompts_and_trees_share_steps(tiny_bundle: Bundle, engine: MedusaEngine, opened: Opener, kind: str) -> None:
    """All prompts go on in one step, and no step of the others is lost to it."""
    backend = opened(kind)
    steps = watched(backend)
    prompts = [[3] * 9, [(5 * i) % 100 + 1 for i in range(40)], [(9 * i) % 100 + 1 for i in range(33)]]
    with MedusaService(tiny_bundle, backend, None, tree_size=4, prefill_chunk=7) as service:
        running = service.submit(prompts[0], max_new_tokens=100)
        next(running)
        with service._thread.changed:
            handles = [running, *(service.submit(prompt, max_new_tokens=20) for prompt in prompts[1:])]
        for prompt, handle, count in zip(prompts, handles, (100, 20, 20), strict=True):
            assert handle.result(60).token_ids == engine.generate(prompt, max_new_tokens=count).token_ids
    together = [(size, taking, others) for size, taking, others in steps if len(taking) == 2]
    assert len(together) == 5 and all(others and size == 7 for size, _, others in together)
    assert not [step for step in steps if step[1] and not step[2]][1:]


@pytest.mark.parametrize("kind", ["onnxruntime-cuda", "tensorrt-rtx"])
def test_typical_acceptance_keeps_its_tree_size_beside_prompts(
    tiny_bundle: Bundle, engine: MedusaEngine, opened: Opener, kind: str
) -> None:
    backend = opened(kind)
    steps = watched(backend)
    typical = SamplingParams(temperature=1.1, acceptance="typical", seed=4)
    with MedusaService(tiny_bundle, backend, None, tree_size=4, prefill_chunk=7) as service:
        drawn = service.submit(PROMPT, max_new_tokens=60, sampling=typical)
        next(drawn)
        other = service.submit([8] * 50, max_new_tokens=5)
        assert other.result(60).token_ids == engine.generate([8] * 50, max_new_tokens=5).token_ids
        alone = engine.generate(PROMPT, max_new_tokens=60, sampling=typical, tree_size=4).token_ids
        assert drawn.result(60).token_ids == alone
    assert not [step for step in steps if step[1] and step[2]]


def test_a_shared_step_that_fails_without_effect_is_done_in_parts(
    tiny_bundle: Bundle, engine: MedusaEngine, opened: Opener
) -> None:
    backend = opened("onnxruntime-cuda")
    step = backend.step

    def fail(size: int, prompts: Any = None, rows: Any = None) -> Any:
        if any(13 in chunk for chunk in (prompts or {}).values()):
            raise BackendError("no thirteens")
        return step(size, prompts, rows)

    backend.step = fail  # type: ignore[method-assign]
    with MedusaService(tiny_bundle, backend, None, tree_size=4, prefill_chunk=7) as service:
        running = service.submit([5] * 30, max_new_tokens=60)
        next(running)
        with service._thread.changed:
            bad, good = (service.submit([last] * 20, max_new_tokens=5) for last in (13, 14))
        with pytest.raises(BackendError, match="thirteens"):
            bad.result(60)
        assert good.result(60).token_ids == engine.generate([14] * 20, max_new_tokens=5).token_ids
        assert running.result(60).token_ids == engine.generate([5] * 30, max_new_tokens=60).token_ids


def test_a_conversation_computes_only_what_is_new(tiny_bundle: Bundle, engine: MedusaEngine, machine: Machine) -> None:
    with MedusaService(tiny_bundle, machine.backend(3), None, tree_size=4) as service:
        tokens = list(PROMPT)
        for turn in range(4):
            result = service.generate(tokens, max_new_tokens=12)
            assert result.token_ids == engine.generate(tokens, max_new_tokens=12).token_ids
            assert not turn or result.stats.cached_tokens >= len(tokens) - 4 - 1
            tokens += [*result.token_ids, 3, 4, 5]


@pytest.mark.parametrize("kind", ["onnxruntime-cuda", "tensorrt-rtx"])
def test_equal_prompts_that_get_rows_at_once(
    tiny_bundle: Bundle, engine: MedusaEngine, opened: Opener, kind: str
) -> None:
    """The second one can't copy entries of the first one, which has none yet; its row had a longer text before."""
    with MedusaService(tiny_bundle, opened(kind), None, tree_size=4) as service:
        for turn in range(3):
            with service._thread.changed:
                old = [service.submit([20 * turn + row + 1] * 50, max_new_tokens=10) for row in range(3)]
            assert all(handle.result(60) for handle in old)
            prompt = [(turn + 7 * i) % 100 + 1 for i in range(30)]
            with service._thread.changed:
                new = [service.submit(prompt, max_new_tokens=10) for _ in range(3)]
            expected = engine.generate(prompt, max_new_tokens=10).token_ids
            assert [handle.result(60).token_ids for handle in new] == [expected] * 3


def test_a_lone_request_steps_ahead_of_the_host_until_another_comes(
    tiny_bundle: Bundle, engine: MedusaEngine, machine: Machine
) -> None:
    backend = machine.backend(3)
    log: list[str] = []
    for name in ("submit", "collect"):
        call = getattr(backend, name)
        setattr(backend, name, lambda *given, call=call, name=name: (log.append(name), call(*given))[1])
    with MedusaService(tiny_bundle, backend, None, tree_size=4) as service:
        alone = service.submit(PROMPT, max_new_tokens=60, lookup=False)
        next(alone)
        handles = [service.submit(PROMPT[:length], max_new_tokens=30, lookup=False) for length in (5, 9, 13, 2)]
        for handle, length, count in zip([alone, *handles], (13, 5, 9, 13, 2), (60, *[30] * 4), strict=True):
            expected = engine.generate(PROMPT[:length], max_new_tokens=count).token_ids
            assert handle.result(30).token_ids == expected
    assert ["submit", "submit"] in [log[i : i + 2] for i in range(len(log))]
    assert log.count("submit") == log.count("collect")


def test_what_does_not_fit_is_refused_in_one_sentence(
    tiny_bundle: Bundle, engine: MedusaEngine, machine: Machine
) -> None:
    """A request that fits uses its last slot, beside rows of the same length."""
    longest = machine.description.limits.longest_sequence(TREE)
    with MedusaService(tiny_bundle, machine.backend(3), None, tree_size=9) as service:
        for _ in range(2):  # in the second round free rows hold long texts
            handles = [service.submit([token] * 60, max_new_tokens=longest - 60) for token in (5, 6, 7, 8, 9)]
            with pytest.raises(RequestError, match=r"takes 129\. Ask for less, or build .* --max-seq-len 129"):
                service.submit([4] * 60, max_new_tokens=longest - 59)
            for token, handle in zip((5, 6, 7, 8, 9), handles, strict=True):
                expected = engine.generate([token] * 60, max_new_tokens=longest - 60).token_ids
                assert handle.result(60).token_ids == expected
            assert len(service.generate([4] * (longest - 1), max_new_tokens=1).token_ids) == 1


def test_a_device_that_fails_ends_the_requests_of_that_step(
    tiny_bundle: Bundle, engine: MedusaEngine, machine: Machine
) -> None:
    prompts = [PROMPT[: 5 + row] for row in range(3)]
    failed = 0
    with MedusaService(tiny_bundle, machine.backend(3), None, tree_size=4) as service:
        handles = [service.submit(prompt, max_new_tokens=90) for prompt in prompts]
        for handle in handles:
            next(handle)
        machine.cuda.fail["cudaEventSynchronize"] = cudaError_t.cudaErrorInvalidValue
        for prompt, handle in zip(prompts, handles, strict=True):
            try:
                assert handle.result(30).token_ids == engine.generate(prompt, max_new_tokens=90).token_ids
            except DoubtfulRowsError as error:
                assert "cudaEventSynchronize" in str(error)  # noqa: PT017  # it may also be answered
                failed += 1
        assert failed and service.state == "ready"
        expected = engine.generate(PROMPT, max_new_tokens=20).token_ids
        assert service.generate(PROMPT, max_new_tokens=20).token_ids == expected


def test_an_engine_folder_is_loaded_by_name(
    tiny_bundle: Bundle, tiny_engine: CompiledEngine, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.trt.__version__ = tiny_engine.version
    monkeypatch.setattr(backend_module, "import_tensorrt", lambda flavor: machine.library)
    monkeypatch.setattr(Cuda, "open", classmethod(lambda cls, device: cls(machine.cuda, device)))
    for name in ("auto", "tensorrt-rtx"):
        with MedusaService.load(tiny_engine.folder, name, rows=2, tree_size=4) as service:
            assert service.generate("Hi", max_new_tokens=5).finish_reason == "length"
        assert not machine.cuda.blocks
    with pytest.raises(BackendError, match="holds 1 to 3 sequences, not 4"):
        MedusaService.load(tiny_engine.folder)

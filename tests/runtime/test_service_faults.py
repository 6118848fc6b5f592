"""A backend that fails in any call: only the requests that caused it end, and the service goes on."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medusa_runtime import (
    BackendError,
    Bundle,
    CallbackError,
    Chunk,
    MedusaEngine,
    MedusaService,
    Metrics,
    QueueFullError,
    RequestError,
    ServiceClosedError,
)
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.common.steady_clock import SteadyClock
from support.gate import Gate
from support.rig import KINDS, rig_of

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]
SHARED = [(11 * i + 1) % 100 + 1 for i in range(40)]
SCRIPTS = Path(__file__).parents[2] / "scripts"

Answers = list[tuple[list[int], tuple[int, ...]]]  # prompts, each with its answer


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> MedusaEngine:
    return MedusaEngine.load(tiny_bundle.folder, threads=1)


@pytest.fixture(scope="module")
def answers(engine: MedusaEngine) -> Answers:
    """Prompts with the same start, and the answer to each."""
    prompts = [[*SHARED, *range(5 + number)] for number in range(6)]
    return [(prompt, engine.generate(prompt, max_new_tokens=12).token_ids) for prompt in prompts]


class Fragile:
    """A backend of which one call fails each time that ``due`` returns True, before or after its work."""

    def __init__(self, inner: Any, name: str, error: Exception, when: str) -> None:
        self.inner = inner
        self.due: Callable[[], bool] = lambda: False
        self._name, self._error, self._when = name, error, when

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if name != self._name:
            return value
        if not callable(value):
            if self.due():
                raise self._error
            return value

        def call(*arguments: Any) -> Any:
            if not self.due():
                return value(*arguments)
            if self._when == "after":
                value(*arguments)
            raise self._error

        return call


def cpu_backend(bundle: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle, rows=3, threads=1)


CALLS = ["step", "arrange", "prepare_arrange", "copy", "assign", "reset", "lengths", "drafts"]
ERRORS = [  # each kind before the call, and one of them after it, too
    (BackendError("broken"), "before"),
    *(
        pytest.param(*way, marks=pytest.mark.slow)
        for way in (
            (BackendError("broken"), "after"),
            (MemoryError(), "before"),
            (RuntimeError("odd"), "before"),
            (StopIteration(), "before"),
        )
    ),
]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("error", "when"), ERRORS, ids=repr)
def test_a_call_that_fails_now_and_then(
    tiny_bundle: Bundle, answers: Answers, name: str, error: Exception, when: str
) -> None:
    check_answers(tiny_bundle, answers, Fragile(cpu_backend(tiny_bundle), name, error, when))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["step", "reserve", "copy", "assign", "reset", "lengths", "drafts"])
def test_a_call_of_a_device_that_fails_now_and_then(
    tiny_bundle: Bundle, answers: Answers, tmp_path: Path, kind: str, name: str, when: str
) -> None:
    with rig_of(kind, tiny_bundle, tmp_path) as rig:
        check_answers(tiny_bundle, answers, Fragile(rig.backend(), name, RuntimeError("odd"), when))


def check_answers(bundle: Bundle, answers: Answers, fragile: Fragile) -> None:
    """Each request gets its right answer or a typed error. Later requests are answered."""
    prompts, expected = zip(*answers, strict=True)
    with MedusaService(bundle, fragile, None, tree_size=4, prefill_chunk=16) as service:
        for every in (2, 3, 7, 19):
            count = iter(range(10**9))
            fragile.due = lambda every=every, count=count: next(count) % every == every - 1
            handles = [service.submit(prompt, max_new_tokens=12) for prompt in prompts]
            for handle, tokens in zip(handles, expected, strict=True):
                try:
                    assert handle.result(30).token_ids == tokens
                except BackendError:
                    assert [token for chunk in handle_chunks(handle) for token in chunk.token_ids] == list(
                        tokens[: handle.stats.completion_tokens]
                    )
        fragile.due = lambda: False
        assert service.state == "ready"
        handles = [service.submit(prompt, max_new_tokens=12) for prompt in prompts]
        assert tuple(handle.result(30).token_ids for handle in handles) == expected


def handle_chunks(handle: Any) -> Iterator[Chunk]:
    try:
        yield from handle
    except BackendError:
        return


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_always_fails_for_a_while(tiny_bundle: Bundle, engine: MedusaEngine, name: str) -> None:
    """No request waits for ever, and the service goes on."""
    fragile = Fragile(cpu_backend(tiny_bundle), name, RuntimeError("odd"), "before")
    with MedusaService(tiny_bundle, fragile, None, tree_size=4) as service:
        running = service.submit(SHARED, max_new_tokens=300)
        next(running)
        fragile.due = lambda: True
        handles = [running, *(service.submit([*SHARED, number], max_new_tokens=12) for number in range(5))]
        for handle in handles:
            try:
                handle.result(30)
            except BackendError as error:
                assert "odd" in str(error)  # noqa: PT017  # it may also be answered
        assert service.drain(30) and service.failure is None
        fragile.due = lambda: False
        with service._thread.changed:
            service._thread._accepting = True
        assert (
            service.generate(PROMPT, max_new_tokens=9).token_ids == engine.generate(PROMPT, max_new_tokens=9).token_ids
        )


@pytest.mark.parametrize("name", ["copy", "assign"])
def test_a_failure_of_one_request_ends_no_other(tiny_bundle: Bundle, engine: MedusaEngine, name: str) -> None:
    fragile = Fragile(cpu_backend(tiny_bundle), name, RuntimeError("odd"), "before")
    with MedusaService(tiny_bundle, fragile, None, tree_size=4) as service:
        running = service.submit(SHARED, max_new_tokens=300)
        next(running)
        fragile.due = lambda: True
        with pytest.raises(BackendError, match=f"failed in {name}: RuntimeError"):
            service.generate([*SHARED, 7], max_new_tokens=9)
        fragile.due = lambda: False
        assert running.result(30).token_ids == engine.generate(SHARED, max_new_tokens=300).token_ids


@pytest.mark.parametrize("name", ["arrange", "prepare_arrange", "lengths"])
def test_a_failure_that_no_request_caused_is_tried_again(tiny_bundle: Bundle, engine: MedusaEngine, name: str) -> None:
    """A single failure ends no request, neither while rows are moved nor before a step of several rows."""
    prompts = [[5] * 30, [7] * 11]
    fragile = Fragile(cpu_backend(tiny_bundle), name, RuntimeError("odd"), "before")
    with MedusaService(tiny_bundle, fragile, None, tree_size=4) as service:
        handles = [service.submit(prompt, max_new_tokens=300) for prompt in prompts]
        for handle in handles:
            next(handle)
        once = iter([True])
        fragile.due = lambda: next(once, False)
        for handle, prompt in zip(handles, prompts, strict=True):
            assert handle.result(30).token_ids == engine.generate(prompt, max_new_tokens=300).token_ids


def test_a_failure_that_no_request_caused_ends_running_requests(
    tiny_bundle: Bundle, engine: MedusaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(tiny_bundle, rows=2)
    with MedusaService(tiny_bundle, gate, None, tree_size=4) as service:
        gate.open.clear()
        handles = [service.submit([5 + number] * 30, max_new_tokens=40) for number in range(3)]
        assert gate.entered.acquire(timeout=30)
        with monkeypatch.context() as patch:
            faults = iter([1 / 1, 0])
            decoding = service._thread.scheduler.decoding
            patch.setattr(service._thread.scheduler, "decoding", lambda: (1 / next(faults, 1), decoding())[1])
            gate.open.set()
            for handle in handles[:2]:
                with pytest.raises(BackendError, match="has ended what was running: ZeroDivisionError"):
                    handle.result(30)
            expected = engine.generate([7] * 30, max_new_tokens=40).token_ids
            assert handles[2].result(30).token_ids == expected
        assert service.state == "ready"
        assert service.generate([5] * 30, max_new_tokens=40).finish_reason == "length"


def test_a_failure_without_any_request_ends_the_service(tiny_bundle: Bundle) -> None:
    class Clock:
        broken = False

        def __call__(self) -> float:
            if self.broken and threading.current_thread().name == "medusa-service":
                raise OSError("no clock")
            return 0.0

    clock = Clock()
    service = MedusaService(tiny_bundle, Gate(tiny_bundle, rows=2), None, tree_size=4, clock=clock)
    clock.broken = True
    with service._thread.changed:
        handles = [service.submit(PROMPT) for _ in range(2)]
    for handle in handles:
        with pytest.raises(BackendError, match="OSError"):
            handle.result(30)
    service._thread.thread.join(30)
    assert service.state == "failed" and isinstance(service.failure, OSError)
    with pytest.raises(ServiceClosedError, match="no clock"):
        service.submit(PROMPT)


def test_a_hook_that_calls_exit(tiny_bundle: Bundle) -> None:
    class Exiting(Metrics):
        def ended(self, *_: object) -> None:
            sys.exit(1)

        def rejected(self) -> None:
            sys.exit(1)

    gate = Gate(tiny_bundle, rows=1)
    with MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=Exiting(), max_queue=0) as service:
        gate.open.clear()
        handle = service.submit(PROMPT, max_new_tokens=5)
        assert gate.entered.acquire(timeout=30)
        with pytest.raises(QueueFullError):
            service.submit(PROMPT)
        gate.open.set()
        assert handle.result(30).finish_reason == "length"
        assert service.generate(PROMPT, max_new_tokens=5).finish_reason == "length"
        assert service.state == "ready"


def test_an_exception_that_ends_the_thread_ends_all_requests(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = MedusaService(tiny_bundle, Gate(tiny_bundle, rows=2), None, tree_size=4)
    monkeypatch.setattr(service._thread.scheduler, "remove", lambda *_: sys.exit(1))
    handles = [service.submit(PROMPT, max_new_tokens=5) for _ in range(4)]
    for handle in handles:
        with pytest.raises(BackendError, match="SystemExit"):
            handle.result(30)
    assert service.state == "failed"
    assert service.drain(30)
    with pytest.raises(ServiceClosedError, match="SystemExit"):
        service.submit(PROMPT)


def test_a_hook_that_waits_for_its_own_service(tiny_bundle: Bundle) -> None:
    refused: list[str] = []

    class Waiting(Metrics):
        def step(self, *_: object) -> None:
            for call in (service.drain, lambda: service.generate(PROMPT)):
                try:
                    call()
                except RequestError as error:
                    refused.append(str(error))

    with MedusaService(tiny_bundle, Gate(tiny_bundle, rows=2), None, tree_size=4, metrics=Waiting()) as service:
        assert service.generate(PROMPT, max_new_tokens=5).finish_reason == "length"
        assert all("wait for its own service" in message for message in refused) and len(refused) >= 2
        assert service.state == "ready"


@pytest.mark.parametrize("raised", [SystemExit(2), KeyboardInterrupt(), ValueError("no")], ids=repr)
def test_a_callback_that_raises_anything_ends_its_request(tiny_bundle: Bundle, raised: BaseException) -> None:
    def bad(_: Chunk) -> None:
        raise raised

    with MedusaService.load(tiny_bundle.folder, rows=2, threads=1, tree_size=4) as service:
        handle = service.submit(PROMPT, max_new_tokens=490, on_chunk=bad)
        with pytest.raises(CallbackError) as caught:
            handle.result(30)
        assert caught.value.__cause__ is raised


def test_threads_that_cannot_start(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request ends if its callback gets no thread. A service without a thread is not made."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ended: list[str] = []
    metrics = Metrics()
    metrics.ended = lambda outcome, stats: ended.append(outcome)
    gate = Gate(tiny_bundle, rows=2)
    with MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=metrics) as service:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(CallbackError, match="no thread to run in"):
                service.submit(PROMPT, max_new_tokens=490, on_chunk=print)
        assert service.generate(PROMPT, max_new_tokens=5).finish_reason == "length"
        assert service.drain(30)
        assert ended == ["CallbackError", "length"]
    gate = Gate(tiny_bundle, rows=2)
    gate.inner.reserve(64)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(BackendError, match="thread can't be started"):
        MedusaService(tiny_bundle, gate, None, tree_size=4)
    assert gate.inner.capacity == 0


def test_a_service_whose_measurements_fail_is_not_made(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(tiny_bundle, rows=2)
    gate.fail = lambda *_: 1 / 0
    monkeypatch.setattr("medusa_runtime.decoding.latency._read", lambda *_: {})
    with pytest.raises(BackendError, match="failed in step: ZeroDivisionError"):
        MedusaService(tiny_bundle, gate, None)
    assert gate.inner.capacity == 0


def test_a_clock_that_jumps_adds_up_what_goes_forwards() -> None:
    now = [100.0]
    clock = SteadyClock(lambda: now[0])
    times = []
    for seen in (100.0, 101.0, 50.0, 51.0, 1e6, 0.0, 2.0):
        now[0] = seen
        times.append(clock())
    assert times == [100.0, 101.0, 101.0, 102.0, 102.0 + 1e6 - 51, 102.0 + 1e6 - 51, 104.0 + 1e6 - 51]


def test_a_deadline_counts_on_after_the_clock_was_set_back(tiny_bundle: Bundle) -> None:
    now = [1e6]
    gate = Gate(tiny_bundle, rows=2)
    with MedusaService(tiny_bundle, gate, None, tree_size=1, clock=lambda: now[0]) as service:
        gate.open.clear()
        handle = service.submit(PROMPT, max_new_tokens=400, timeout=5)
        assert gate.entered.acquire(timeout=30)
        now[0] = 0.0
        gate.open.set()
        next(handle)
        for _ in range(2000):
            now[0] += 3
            if handle.done:
                break
            next(handle, None) if not handle.done else None
        with pytest.raises(TimeoutError, match="not answered in 5 s"):
            list(handle)


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["0.002", "0.02"])
def test_chaos(
    tiny_bundle: Bundle, rate: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Runs the script with a few hundred requests."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import chaos
    from click.testing import CliRunner

    arguments = [str(tiny_bundle.folder), "--requests", "200", "--requests-per-service", "100", "--rate", rate]
    with caplog.at_level(logging.CRITICAL, logger="medusa_runtime"):  # the script sets it, for its whole process
        result = CliRunner().invoke(chaos.main, arguments)
    assert result.exit_code == 0, result.output

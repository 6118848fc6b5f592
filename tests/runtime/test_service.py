"""The service: many requests at a time, each as if it were alone; limits, ends and faults."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from medusa_runtime import (
    BackendError,
    Bundle,
    CallbackError,
    Chunk,
    DeadlineError,
    MedusaEngine,
    MedusaService,
    Metrics,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    RequestHandle,
    ServiceClosedError,
)
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.decoding.sequence import TokenSequence
from medusa_runtime.text.stream import TextStream
from medusa_runtime.text.tokenizer import Tokenizer
from support.decoding import TREE
from support.gate import Gate
from support.stock import Stock

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]


@pytest.fixture(scope="module")
def engine(tiny_bundle: Bundle) -> MedusaEngine:
    return MedusaEngine.load(tiny_bundle.folder, threads=1)


@pytest.fixture(scope="module")
def shared(tiny_bundle: Bundle) -> Iterator[MedusaService]:
    with MedusaService.load(tiny_bundle.folder, rows=3, threads=1, tree_size=4) as service:
        yield service


@pytest.fixture
def gate(tiny_bundle: Bundle) -> Gate:
    return Gate(tiny_bundle, rows=2)


@pytest.fixture
def service(tiny_bundle: Bundle, gate: Gate) -> Iterator[MedusaService]:
    service = MedusaService(
        tiny_bundle, gate, Tokenizer.load(tiny_bundle.folder), max_queue=2, tree_size=4, prefill_chunk=8
    )
    yield service
    gate.open.set()
    service.close()


def random_request(rng: np.random.Generator) -> tuple[list[int], dict[str, int]]:
    return rng.integers(1, 101, rng.integers(1, 90)).tolist(), {"max_new_tokens": int(rng.integers(1, 40))}


@pytest.mark.parametrize("size", [1, 4, 9])
def test_requests_side_by_side_answer_as_alone(tiny_bundle: Bundle, engine: MedusaEngine, size: int) -> None:
    rng = np.random.default_rng(size)
    requests = [random_request(rng) for _ in range(40)]
    with MedusaService.load(tiny_bundle.folder, rows=4, threads=1, tree_size=size, prefill_chunk=7) as service:
        handles = [service.submit(prompt, **options) for prompt, options in requests]
        for (prompt, options), handle in zip(requests, handles, strict=True):
            result = handle.result(60)
            assert result.token_ids == engine.generate(prompt, **options).token_ids
            stats = result.stats
            assert stats.completion_tokens == len(result.token_ids)
            assert stats.steps == sum(stats.accepted_lengths.values())
            assert min(stats.queue_seconds, stats.prefill_seconds, stats.decode_seconds) >= 0
        assert service.load_figures == (0, 0)


def test_auto_measures_for_each_number_of_rows(tiny_bundle: Bundle, engine: MedusaEngine) -> None:
    with MedusaService.load(tiny_bundle.folder, rows=3, threads=1) as service:
        handles = [service.submit(PROMPT, max_new_tokens=20) for _ in range(5)]
        expected = engine.generate(PROMPT, max_new_tokens=20).token_ids
        assert [handle.result(60).token_ids for handle in handles] == [expected] * 5
        assert set(service._thread.runner.choice.sizes) == {1, 2, 3}


def test_kinds_of_prompts_stops_and_streams(shared: MedusaService, engine: MedusaEngine) -> None:
    alone = engine.generate("Hello", max_new_tokens=30)
    assert shared.generate("Hello", max_new_tokens=30).text == alone.text
    chunks = list(shared.stream("Hello", max_new_tokens=30))
    assert "".join(chunk.text for chunk in chunks) == alone.text
    stop = alone.text[7:9]
    stopped = shared.generate("Hello", max_new_tokens=30, stop=stop)
    assert (stopped.text, stopped.finish_reason) == (alone.text[: alone.text.index(stop)], "stop")
    chat = [{"role": "user", "content": "Hi"}]
    assert shared.generate(chat, max_new_tokens=6).token_ids == engine.generate(chat, max_new_tokens=6).token_ids
    token = alone.token_ids[5]
    assert shared.generate("Hello", stop_token_ids=[token]).token_ids[-1] == token


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "prompt is empty"),
        ([101], {}, "from 0 to 100"),
        ("Hi", {"max_new_tokens": 511}, "exceed the 512 tokens"),
        ("Hi", {"timeout": 0}, "more than 0 seconds"),
        ("Hi", {"timeout": float("nan")}, "more than 0 seconds"),
        ("Hi", {"timeout": "5"}, "more than 0 seconds"),
        ("Hi", {"timeout": True}, "more than 0 seconds"),
        ([5] * 400, {"max_new_tokens": np.uint8(200)}, "exceed the"),
        ("Hi", {"priority": None}, "priority is None: expected an integer"),
        ("Hi", {"priority": float("nan")}, "priority is nan"),
        ("Hi", {"max_new_tokens": 1.5}, "max_new_tokens is 1.5: expected an integer of at least 1"),
        ("Hi", {"max_new_tokens": None}, "max_new_tokens is None"),
        ("Hi", {"stop_token_ids": 2.5}, "stop_token_ids is 2.5"),
        ("Hi", {"stop_token_ids": ["</s>"]}, "stop_token_ids is '</s>'"),
    ],
)
def test_unusable_requests(shared: MedusaService, prompt: object, options: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        shared.submit(prompt, **options)


def test_unusable_options(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused before anything is opened; what is opened is closed if that was in vain."""
    opened: list[OnnxRuntimeBackend] = []

    def open_it(*_: object, **options: int) -> OnnxRuntimeBackend:
        opened.append(OnnxRuntimeBackend(tiny_bundle, rows=options["rows"], threads=1))
        opened[0].reserve(64)
        return opened[0]

    monkeypatch.setattr("medusa_runtime.service.open_batch_backend", open_it)
    for options in ({"rows": 0}, {"max_queue": -1}, {"tree_size": 10}, {"tree_size": True}, {"prefill_chunk": 0},
                    {"rows": "4"}, {"max_queue": 1.5}, {"prefill_chunk": None}):  # fmt: skip
        with pytest.raises(RequestError):
            MedusaService.load(tiny_bundle.folder, threads=1, **options)
    assert not opened
    monkeypatch.setattr("medusa_runtime.service.BatchRunner", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MedusaService.load(tiny_bundle.folder, threads=1)
    assert opened[0].capacity == 0


def test_unknown_options_are_not_passed_over(shared: MedusaService) -> None:
    with pytest.raises(TypeError, match="no option 'max_tokens': a request has max_new_tokens, "):
        shared.submit(PROMPT, max_tokens=3)


def test_asyncio_and_threads_at_once(shared: MedusaService, engine: MedusaEngine) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=15).token_ids

    async def one() -> list[int]:
        return [token async for chunk in shared.astream(PROMPT, max_new_tokens=15) for token in chunk.token_ids]

    async def several() -> list[tuple[int, ...]]:
        streams = await asyncio.gather(*(one() for _ in range(4)))
        results = await asyncio.gather(*(shared.agenerate(PROMPT, max_new_tokens=15) for _ in range(4)))
        return [*map(tuple, streams), *(result.token_ids for result in results)]

    with ThreadPoolExecutor(4) as pool:
        loops = [pool.submit(asyncio.run, several()) for _ in range(2)]
        plain = [pool.submit(shared.generate, PROMPT, max_new_tokens=15) for _ in range(4)]
        assert [tokens for loop in loops for tokens in loop.result(60)] == [expected] * 16
        assert [result.result(60).token_ids for result in plain] == [expected] * 4


def test_a_full_queue_refuses_at_once(service: MedusaService, gate: Gate) -> None:
    gate.open.clear()
    handles = [service.submit(PROMPT, max_new_tokens=3) for _ in range(4)]  # two rows and two that wait
    with pytest.raises(QueueFullError, match="as many as this service takes"):
        service.submit(PROMPT)
    handles[3].cancel()
    gate.open.set()
    with pytest.raises(RequestCancelledError):
        handles[3].result(30)
    assert all(len(handle.result(30).token_ids) == 3 for handle in handles[:3])


def test_priority_goes_first(service: MedusaService, gate: Gate) -> None:
    gate.open.clear()
    first = [service.submit(PROMPT, max_new_tokens=2) for _ in range(2)]
    gate.entered.acquire(timeout=30)  # both have their rows
    order: list[str] = []
    low = service.submit(PROMPT, max_new_tokens=30, on_chunk=lambda _: order.append("low"))
    high = service.submit(PROMPT, max_new_tokens=1, priority=1, on_chunk=lambda _: order.append("high"))
    gate.open.set()
    assert all(handle.result(30) for handle in (*first, low, high))
    assert high.stats.queue_seconds <= low.stats.queue_seconds


def test_cancel_while_it_waits_and_while_it_runs(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    gate.open.clear()
    running, other, waiting = (service.submit(PROMPT, max_new_tokens=400) for _ in range(3))
    gate.entered.acquire(timeout=30)
    waiting.cancel()
    running.cancel()
    running.cancel()
    gate.open.set()
    for handle in (running, waiting):
        with pytest.raises(RequestCancelledError):
            handle.result(30)
        with pytest.raises(RequestCancelledError):
            list(handle)
    assert not other.done or other.result()
    other.cancel()
    with pytest.raises(RequestCancelledError):
        other.result(30)
    result = service.generate(PROMPT, max_new_tokens=5)
    assert result.token_ids == engine.generate(PROMPT, max_new_tokens=5).token_ids
    other.cancel()  # of no effect


def test_deadlines_run_in_the_queue_and_in_a_row(tiny_bundle: Bundle, gate: Gate) -> None:
    now = [1000.0]
    with MedusaService(tiny_bundle, gate, None, tree_size=1, clock=lambda: now[0]) as service:
        gate.open.clear()
        late = service.submit(PROMPT, max_new_tokens=400, timeout=5)
        fine = service.submit(PROMPT, max_new_tokens=10, timeout=50)
        queued = service.submit(PROMPT, max_new_tokens=10, timeout=5)
        gate.entered.acquire(timeout=30)
        now[0] += 6
        gate.open.set()
        for handle in (late, queued):
            with pytest.raises(DeadlineError, match="in 5 s"):
                handle.result(30)
        assert len(fine.result(30).token_ids) == 10
        assert isinstance(DeadlineError("x"), TimeoutError)


@pytest.mark.parametrize("jump", [1e6, -1e6])
def test_a_clock_that_jumps(tiny_bundle: Bundle, gate: Gate, jump: float) -> None:
    """Forwards it ends requests that had a deadline; back it ends none. Others don't care."""
    now = [5e6]
    with MedusaService(tiny_bundle, gate, None, tree_size=1, clock=lambda: now[0]) as service:
        gate.open.clear()
        timed = service.submit(PROMPT, max_new_tokens=30, timeout=60)
        free = service.submit(PROMPT, max_new_tokens=30)
        gate.entered.acquire(timeout=30)
        now[0] += jump
        gate.open.set()
        assert len(free.result(30).token_ids) == 30
        if jump > 0:
            with pytest.raises(DeadlineError):
                timed.result(30)
        else:
            assert len(timed.result(30).token_ids) == 30
        for stats in (timed.stats, free.stats):
            assert min(stats.queue_seconds, stats.prefill_seconds, stats.decode_seconds) >= 0
        assert len(service.generate(PROMPT, max_new_tokens=5, timeout=60).token_ids) == 5
        assert service.load_figures == (0, 0)


def test_the_clock_of_the_wall_may_jump(shared: MedusaService, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = shared.submit(PROMPT, max_new_tokens=100, timeout=60)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert len(handle.result(60).token_ids) == 100


def test_a_callback_that_raises_ends_its_request_only(service: MedusaService, engine: MedusaEngine) -> None:
    def bad(_: Chunk) -> None:
        raise ValueError("no")

    broken = service.submit(PROMPT, max_new_tokens=450, on_chunk=bad)
    seen: list[int] = []
    good = service.submit(PROMPT, max_new_tokens=30, on_chunk=lambda chunk: seen.extend(chunk.token_ids))
    with pytest.raises(CallbackError, match="no") as caught:
        broken.result(30)
    assert isinstance(caught.value.__cause__, ValueError)
    expected = engine.generate(PROMPT, max_new_tokens=30).token_ids
    assert good.result(30).token_ids == expected
    for _ in range(200):  # the callback's own thread may be behind
        if len(seen) == 30:
            break
        time.sleep(0.01)
    assert tuple(seen) == expected


def test_a_slow_consumer_stalls_nobody(service: MedusaService) -> None:
    never = threading.Event()
    slow = service.submit(PROMPT, max_new_tokens=50, on_chunk=lambda _: never.wait(60))
    unread = service.submit(PROMPT, max_new_tokens=50)
    assert service.generate(PROMPT, max_new_tokens=50).finish_reason == "length"
    assert slow.result(30) and unread.result(30)
    never.set()
    assert sum(len(chunk.token_ids) for chunk in unread) == 50


def test_a_client_that_vanishes_frees_its_row(service: MedusaService, gate: Gate) -> None:
    async def leave() -> None:
        async for _ in service.astream(PROMPT, max_new_tokens=450):
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        asyncio.run(leave())
    stream = service.stream(PROMPT, max_new_tokens=450)
    next(stream)
    stream.close()

    async def give_up() -> None:
        await asyncio.wait_for(service.agenerate(PROMPT, max_new_tokens=450), 0.001)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert service.drain(30)
    assert gate.inner.lengths.max() < 400


def test_an_event_loop_that_is_closed_harms_nobody(service: MedusaService, gate: Gate) -> None:
    gate.open.clear()
    handle = service.submit(PROMPT, max_new_tokens=5)
    loop = asyncio.new_event_loop()
    task = loop.create_task(handle.aresult())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    gate.open.set()
    assert len(handle.result(30).token_ids) == 5
    del task


def test_an_event_loop_that_is_closed_while_it_streams_harms_nobody(service: MedusaService, gate: Gate) -> None:
    stream = service.astream(PROMPT, max_new_tokens=450)

    async def begin(stream: AsyncIterator[Chunk]) -> Chunk:
        return await anext(stream)

    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(begin(stream)).token_ids
    gate.open.clear()
    task = loop.create_task(begin(stream))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    gate.open.set()
    assert len(service.generate(PROMPT, max_new_tokens=5).token_ids) == 5
    del task, stream
    gc.collect()
    assert service.drain(30)


def test_a_stream_that_nobody_begins_to_read_is_cancelled(service: MedusaService, gate: Gate) -> None:
    gate.open.clear()
    stream = service.stream(PROMPT, max_new_tokens=450)
    del stream
    gc.collect()
    gate.open.set()
    assert service.drain(30)
    assert gate.inner.lengths.max() < 400


def test_text_that_fails_ends_its_request_only(service: MedusaService, monkeypatch: pytest.MonkeyPatch) -> None:
    push = TextStream.push

    def fail(self: TextStream, tokens: Sequence[int]) -> str:
        if threading.current_thread().name == "medusa-service" and self in victims:
            raise UnicodeError("no such character")
        return push(self, tokens)

    victims: list[TextStream | None] = []
    monkeypatch.setattr(TextStream, "push", fail)
    other = service.submit(PROMPT, max_new_tokens=60)
    of = TokenSequence.of

    def remember(*arguments: object, **options: object) -> TokenSequence:
        sequence = of(*arguments, **options)
        victims.append(sequence._text)
        return sequence

    monkeypatch.setattr(TokenSequence, "of", remember)
    with pytest.raises(RequestError, match="can't be made text: UnicodeError"):
        service.generate(PROMPT, max_new_tokens=60)
    assert len(other.result(30).token_ids) == 60
    assert service.load_figures == (0, 0)


def test_a_hook_may_close_the_service(tiny_bundle: Bundle, gate: Gate) -> None:
    class Impatient(Metrics):
        def ended(self, *_: object) -> None:
            service.close()

    service = MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=Impatient())
    first = service.submit(PROMPT, max_new_tokens=3)
    second = service.submit(PROMPT, max_new_tokens=400)
    assert len(first.result(30).token_ids) == 3
    with pytest.raises(ServiceClosedError):
        second.result(30)
    service.close()
    assert gate.inner.capacity == 0


def test_a_hook_may_cancel_other_requests(tiny_bundle: Bundle, gate: Gate, engine: MedusaEngine) -> None:
    class Family(Metrics):
        """All go where one goes."""

        def ended(self, reason: str, *_: object) -> None:
            if reason == "RequestCancelledError":
                for handle in handles:
                    handle.cancel()

    with MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=Family()) as service:
        gate.open.clear()
        handles = [service.submit(PROMPT, max_new_tokens=400) for _ in range(4)]
        assert gate.entered.acquire(timeout=30)
        handles[0].cancel()
        gate.open.set()
        for handle in handles:
            with pytest.raises(RequestCancelledError):
                handle.result(30)
        assert (
            service.generate(PROMPT, max_new_tokens=5).token_ids == engine.generate(PROMPT, max_new_tokens=5).token_ids
        )


def test_a_hook_may_close_an_idle_service_or_give_it_work(tiny_bundle: Bundle, gate: Gate) -> None:
    done: list[RequestHandle] = []

    class Restless(Metrics):
        def load(self, waiting: int, running: int) -> None:
            if not hasattr(self, "service"):
                return
            if not done:
                done.append(self.service.submit(PROMPT, max_new_tokens=3))
            elif done[0].done and not running:
                self.service.close()

    metrics = Restless()
    service = MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=metrics)
    metrics.service = service
    service.submit(PROMPT, max_new_tokens=3).result(30)
    service._thread.thread.join(30)
    assert not service._thread.thread.is_alive()
    assert len(done[0].result(0).token_ids) == 3
    assert gate.inner.capacity == 0


def test_whoever_cancels_waits_for_nobody(service: MedusaService, gate: Gate) -> None:
    """A garbage collector may do it in any thread, whatever locks that holds."""
    gate.open.clear()
    handle = service.submit(PROMPT, max_new_tokens=400)
    assert gate.entered.acquire(timeout=30)
    with service._thread.changed:
        thread = threading.Thread(target=handle.cancel)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    gate.open.set()
    with pytest.raises(RequestCancelledError):
        handle.result(30)


def test_a_step_that_fails_ends_the_request_whose_fault_it_is(
    service: MedusaService, gate: Gate, engine: MedusaEngine
) -> None:
    def fail(size: int, prompts: dict[int, list[int]], rows: Sequence[int]) -> None:
        if not prompts and any(gate.inner.lengths[row] == bad for row in rows):
            raise RuntimeError("a kernel failed")

    victim, other = [5] * 60, [7] * 11  # the other one never gets so long
    bad = len(victim) + 2
    gate.fail = fail
    service._thread.runner._tree_size = 1  # so that the victim passes by that length
    handles = [service.submit(prompt, max_new_tokens=30) for prompt in (victim, other)]
    with pytest.raises(BackendError, match="a kernel failed"):
        handles[0].result(30)
    assert handles[1].result(30).token_ids == engine.generate(other, max_new_tokens=30).token_ids
    gate.fail = lambda *_: None
    again = service.generate(victim, max_new_tokens=30)
    assert again.token_ids == engine.generate(victim, max_new_tokens=30).token_ids


def test_a_prompt_that_fails_ends_its_request_only(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    def fail(size: int, prompts: dict[int, list[int]], rows: Sequence[int]) -> None:
        if any(13 in chunk for chunk in prompts.values()):
            raise BackendError("no thirteens")

    gate.fail = fail
    good = service.submit([5] * 30, max_new_tokens=40)
    with pytest.raises(BackendError, match="thirteens"):
        service.generate([7] * 20 + [13], max_new_tokens=5)
    assert good.result(30).token_ids == engine.generate([5] * 30, max_new_tokens=40).token_ids


def test_no_memory_while_a_cache_grows(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    def fail_arrange(rows: Sequence[int], capacity: int) -> None:
        if capacity > 200:
            raise MemoryError

    gate.fail_arrange = fail_arrange
    long = service.submit([9] * 150, max_new_tokens=300)
    short = service.submit([3] * 10, max_new_tokens=60)
    with pytest.raises(BackendError, match="no room"):
        long.result(30)
    assert short.result(30).token_ids == engine.generate([3] * 10, max_new_tokens=60).token_ids
    with pytest.raises(BackendError, match="no room"):
        service.generate([9] * 220)
    assert len(service.generate([9] * 100, max_new_tokens=20).token_ids) == 20


def test_what_free_rows_hold_makes_way(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    """A request that there is no room for gets that of prefixes that nobody uses."""
    service.generate([7] * 250, max_new_tokens=2)
    lengths = gate.inner.lengths

    def fail_arrange(rows: Sequence[int], capacity: int) -> None:
        if capacity > 60 and lengths.max() > 200:
            raise MemoryError

    gate.fail_arrange = fail_arrange
    result = service.generate([9] * 100, max_new_tokens=5)
    assert result.token_ids == engine.generate([9] * 100, max_new_tokens=5).token_ids
    assert lengths.max() < 200


def test_no_memory_to_step_together(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    """Where rows can't be brought together they go on one by one."""

    def fail_arrange(rows: Sequence[int], capacity: int) -> None:
        if len(rows) > 1:
            raise MemoryError

    gate.fail_arrange = fail_arrange
    prompts = [[9] * 30, [3] * 10]
    handles = [service.submit(prompt, max_new_tokens=40) for prompt in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        assert handle.result(30).token_ids == engine.generate(prompt, max_new_tokens=40).token_ids


def test_no_memory_for_what_is_taken_over(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    gate.open.clear()
    first = service.submit([*[9] * 40, 1], max_new_tokens=300)
    gate.entered.acquire(timeout=30)
    gate.open.set()
    next(first)
    taken = []

    def fail_arrange(rows: Sequence[int], capacity: int) -> None:
        if len(rows) == 1 and rows != [0] and not taken:
            taken.append(capacity)
            raise MemoryError

    gate.fail_arrange = fail_arrange
    with pytest.raises(BackendError, match="no room"):
        service.generate([*[9] * 40, 2], max_new_tokens=5)
    assert taken == [TREE.max_depth + 40 + 1]  # it was where its beginning was to be copied
    again = service.generate([*[9] * 40, 2], max_new_tokens=5)
    assert again.token_ids == engine.generate([*[9] * 40, 2], max_new_tokens=5).token_ids
    assert first.result(30).token_ids == engine.generate([*[9] * 40, 1], max_new_tokens=300).token_ids


def test_a_long_row_steps_by_itself(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    service._thread.runner._worth_a_step = 100
    seen: list[list[int]] = []
    gate.fail = lambda size, prompts, rows: seen.append(sorted(rows)) if not prompts else None
    prompts = [[9] * 300, [3] * 10]
    handles = [service.submit(prompt, max_new_tokens=60) for prompt in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        assert handle.result(30).token_ids == engine.generate(prompt, max_new_tokens=60).token_ids
    assert [0, 1] not in seen
    seen.clear()
    service._thread.runner._worth_a_step = 1000
    handles = [service.submit(prompt, max_new_tokens=60) for prompt in prompts]
    assert all(handle.result(30) for handle in handles)
    assert [0, 1] in seen


@pytest.mark.parametrize("rows", [[0, 1], [1]])
@pytest.mark.parametrize("standard", [True, False])
def test_a_failed_step_leaves_rows_as_they_were(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, standard: bool, rows: list[int]
) -> None:
    backend = OnnxRuntimeBackend(tiny_bundle, rows=2, threads=1, graph=tiny_bundle.graph if standard else None)
    backend.step(9, {0: PROMPT[:9], 1: PROMPT[1:9]})
    backend.step(4)
    run = backend._session.run_with_iobinding

    def run_and_fail(binding: object) -> None:
        run(binding)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(backend._session, "run_with_iobinding", run_and_fail)
    before = [array.copy() for array, _ in backend._state._next]
    with pytest.raises(BackendError, match="failed in a step of 9 tokens"):
        backend.step(9, {}, rows)
    assert all(np.array_equal(array, old) for (array, _), old in zip(backend._state._next, before, strict=True))


def test_rows_far_apart_step_alone(tiny_bundle: Bundle, engine: MedusaEngine) -> None:
    """A step runs over the rows that take part and no others, wherever their places were."""
    backend = OnnxRuntimeBackend(tiny_bundle, rows=8, threads=1)
    prompts = {row: [(row + 3 * i) % 100 + 1 for i in range(10 + row)] for row in range(8)}
    backend.arrange(range(8), 64)
    tokens = {row: [] for row in prompts}
    result = backend.step(17, prompts)
    for row in prompts:
        tokens[row].append(int(result.tokens[row, 0]))
    widths = []
    session = backend._session

    class Watched:
        io_binding = session.io_binding

        def run_with_iobinding(self, values: object) -> None:
            widths.append(len(values.get_outputs()[0].numpy()))
            session.run_with_iobinding(values)

    backend._session = Watched()
    for rows in ([0, 7], [7], [1, 3, 6], [0, 7], range(8), [2, 5]):
        backend.arrange(rows, 64)
        result = backend.step(4, {}, rows)
        assert widths.pop() == len(rows)
        for row in rows:
            tokens[row] += result.tokens[row, : result.count[row]].tolist()
    for row, prompt in prompts.items():
        assert tuple(tokens[row]) == engine.generate(prompt, max_new_tokens=40).token_ids[: len(tokens[row])]


def test_drain_and_close(tiny_bundle: Bundle, gate: Gate) -> None:
    service = MedusaService(tiny_bundle, gate, None, tree_size=4)
    gate.open.clear()
    handle = service.submit(PROMPT, max_new_tokens=30)
    assert not service.drain(0.01)
    with pytest.raises(ServiceClosedError):
        service.submit(PROMPT)
    gate.open.set()
    assert service.drain(30)
    assert handle.done and len(handle.result().token_ids) == 30
    service.close()
    service.close()

    gate = Gate(tiny_bundle, rows=2)
    service = MedusaService(tiny_bundle, gate, None, tree_size=4)
    gate.open.clear()
    handles = [service.submit(PROMPT, max_new_tokens=400) for _ in range(5)]
    closing = threading.Thread(target=service.close)
    closing.start()
    time.sleep(0.05)
    gate.open.set()
    for handle in handles:
        with pytest.raises(ServiceClosedError):
            handle.result(30)
    closing.join(30)
    assert gate.inner.capacity == 0


def test_a_service_that_fails_inside_answers_all(
    tiny_bundle: Bundle, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    metrics = Metrics()
    metrics.load = lambda *figures: seen.append(figures)
    service = MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=metrics)
    assert (service.state, service.failure) == ("ready", None)
    monkeypatch.setattr(service._thread.scheduler, "remove", lambda *_: 1 / 0)
    handles = [service.submit(PROMPT) for _ in range(4)]
    for handle in handles:
        with pytest.raises(BackendError, match="failed and is closed") as caught:
            handle.result(30)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    service._thread.thread.join(30)
    assert service.state == "failed" and isinstance(service.failure, ZeroDivisionError)
    assert seen[-1] == (0, 0)
    assert gate.inner.capacity == 0
    with pytest.raises(ServiceClosedError, match="has failed: ZeroDivisionError"):
        service.submit(PROMPT)
    assert service.drain(30)
    service.close()
    assert service.state == "failed"


def test_what_requests_share_is_not_computed_again(service: MedusaService, engine: MedusaEngine, gate: Gate) -> None:
    system = [(11 * i + 1) % 100 + 1 for i in range(40)]
    first = service.generate([*system, 5, 6, 7], max_new_tokens=10)
    assert first.stats.cached_tokens == 0
    for tail in ([8, 9], [10, 11, 12], [8, 9, 10]):
        result = service.generate([*system, *tail], max_new_tokens=10)
        assert result.stats.cached_tokens >= 40
        assert result.token_ids == engine.generate([*system, *tail], max_new_tokens=10).token_ids
    running = service.submit([*system, 20, 21], max_new_tokens=200)
    other = service.generate([*system, 22], max_new_tokens=10)  # from a row that is in use
    assert other.stats.cached_tokens == 40
    assert other.token_ids == engine.generate([*system, 22], max_new_tokens=10).token_ids
    assert running.result(30).token_ids == engine.generate([*system, 20, 21], max_new_tokens=200).token_ids


def test_a_conversation_goes_on_where_it_ended(service: MedusaService, engine: MedusaEngine) -> None:
    tokens = list(PROMPT)
    for turn in range(4):
        result = service.generate(tokens, max_new_tokens=12)
        assert result.token_ids == engine.generate(tokens, max_new_tokens=12).token_ids
        if turn:
            assert result.stats.cached_tokens >= len(tokens) - 4 - 1
        tokens += [*result.token_ids, 3, 4, 5]


def test_standard_graph_shares_too(tiny_bundle: Bundle, engine: MedusaEngine) -> None:
    """Where entries are pending from step to step, they come to their places before rows are copied or cut."""
    backend = OnnxRuntimeBackend(tiny_bundle, rows=3, threads=1, graph=tiny_bundle.graph)
    rng = np.random.default_rng(3)
    with MedusaService(tiny_bundle, backend, None, tree_size=9, prefill_chunk=5) as service:
        known: list[list[int]] = [[1]]
        for _ in range(40):
            base = known[int(rng.integers(len(known)))]
            prompt = [*base[: int(rng.integers(1, len(base) + 1))], *rng.integers(1, 101, 3).tolist()]
            handles = [service.submit(prompt, max_new_tokens=15) for _ in range(2)]
            expected = engine.generate(prompt, max_new_tokens=15).token_ids
            assert [handle.result(30).token_ids for handle in handles] == [expected] * 2
            known.append([*prompt, *expected])


def test_an_fp16_bundle(stock: Stock) -> None:
    """It has no graph of its own for several rows."""
    bundle = stock.export(dtype="float16").bundle
    engine = MedusaEngine.load(bundle.folder, threads=1)
    with MedusaService.load(bundle.folder, rows=3, threads=1, tree_size=4) as service:
        prompts = [[5 + i] * (10 + 7 * i) for i in range(5)]
        handles = [service.submit(prompt, max_new_tokens=30) for prompt in prompts]
        for prompt, handle in zip(prompts, handles, strict=True):
            assert handle.result(30).token_ids == engine.generate(prompt, max_new_tokens=30).token_ids


def test_a_long_prompt_delays_others_by_one_chunk(service: MedusaService, gate: Gate) -> None:
    seen: list[tuple[int, bool]] = []
    gate.fail = lambda size, prompts, rows: seen.append((size, bool(prompts)))
    running = service.submit(PROMPT, max_new_tokens=100)
    next(running)
    before = len(seen)
    long = service.submit([4] * 300, max_new_tokens=1)
    assert long.result(30) and running.result(30)
    steps = seen[before:]
    last_decoding = max(i for i, (_, prefill) in enumerate(steps) if not prefill)
    chunks = [i for i, (_, prefill) in enumerate(steps[:last_decoding]) if prefill]
    assert all(second - first > 1 for first, second in itertools.pairwise(chunks))
    assert all(size <= 8 for size, _ in steps[:last_decoding])


def test_a_chunk_and_a_move_take_turns(service: MedusaService, gate: Gate) -> None:
    """Between two steps of a running stream there is one chunk, or rows are moved far, never both."""
    events: list[str] = []
    gate.fail = lambda size, prompts, rows: events.append("chunk" if prompts else "decode")

    def watched(rows: Sequence[int], capacity: int, at_most: int) -> bool:
        done = approach(rows, capacity, at_most)
        if not done:
            events.append("move")
        return done

    approach, gate.inner.approach = gate.inner.approach, watched
    running = service.submit(PROMPT, max_new_tokens=400)
    next(running)
    assert service.submit([4] * 480, max_new_tokens=20).result(30)
    running.cancel()
    last = max(i for i, event in enumerate(events) if event == "decode")
    between = [
        list(group) for is_step, group in itertools.groupby(events[:last], lambda e: e == "decode") if not is_step
    ]
    assert ["move"] in between[1:]
    assert all(len(group) == 1 for group in between[1:])


def test_a_long_prompt_moves_bit_by_bit(service: MedusaService, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a larger place, and to the others once it decodes: in turns with their steps, and the text is the same."""
    monkeypatch.setattr("medusa_runtime.decoding.runner.MOVED_AT_ONCE", 60)
    monkeypatch.setattr("medusa_runtime.decoding.turns.MOVED_BESIDES", 50)
    expected = service.generate([4] * 300, max_new_tokens=30).token_ids
    steps: list[tuple[int, ...]] = []
    gate.fail = lambda size, prompts, rows: steps.append(("chunk", *rows) if prompts else tuple(sorted(rows)))
    parts: list[tuple[int, ...]] = []
    approach = gate.inner.approach

    def watched(rows: Sequence[int], capacity: int, at_most: int) -> bool:
        done = approach(rows, capacity, at_most)
        if not done:
            steps.append("move")
            parts.append(tuple(rows))
        return done

    gate.inner.approach = watched
    running = service.submit(PROMPT, max_new_tokens=400)
    next(running)
    steps.clear()
    assert service.submit([5, *[4] * 299], max_new_tokens=1).result(30)
    result = service.submit([4] * 300, max_new_tokens=30, lookup=False).result(30)
    running.cancel()
    assert result.token_ids == expected
    assert {len(rows) for rows in parts} == {1, 2}
    assert (0, 1) in steps
    last = max(i for i, step in enumerate(steps) if step == "move")
    for first, second in itertools.pairwise(steps[: last + 2]):
        assert first != "move" or second not in ("move", "chunk"), steps


def test_hooks_that_raise_harm_nobody(tiny_bundle: Bundle, gate: Gate) -> None:
    class Broken(Metrics):
        def step(self, *_: object) -> None:
            raise ValueError

        def ended(self, *_: object) -> None:
            raise ValueError

    with MedusaService(tiny_bundle, gate, None, tree_size=4, metrics=Broken()) as service:
        assert len(service.generate(PROMPT, max_new_tokens=10).token_ids) == 10


def test_nothing_is_kept_of_requests_that_ended(service: MedusaService) -> None:
    handle = service.submit(PROMPT, max_new_tokens=5)
    handle.result(30)
    gone = weakref.ref(handle)
    for _ in range(2):
        service.generate(PROMPT, max_new_tokens=2)
    del handle
    gc.collect()
    assert gone() is None


def test_a_session_computes_only_what_is_new(service: MedusaService, engine: MedusaEngine) -> None:
    session = service.session([{"role": "system", "content": "Be brief."}])
    said = list(session.messages)
    for turn, text in enumerate(("Hi", "And then?", "Why?")):
        result = session.send(text, max_new_tokens=10)
        said.append({"role": "user", "content": text})
        alone = engine.generate(said, max_new_tokens=10)
        assert result.token_ids == alone.token_ids
        said.append({"role": "assistant", "content": alone.text})
        # The model's tokens and those of its text part ways at most where the answer begins.
        assert turn == 0 or result.stats.cached_tokens >= 20
    assert session.messages == said
    with pytest.raises(RequestError):
        session.send("x" * 600)
    assert session.messages == said
    assert asyncio.run(session.asend("Bye", max_new_tokens=5)).stats.cached_tokens > 20


def test_prompts_of_many_lengths_leave_nothing_behind(tiny_bundle: Bundle) -> None:
    backend = OnnxRuntimeBackend(tiny_bundle, rows=2, threads=1)
    with MedusaService(tiny_bundle, backend, None, tree_size=4) as service:
        for length in range(1, 60):
            service.generate([7] * length, max_new_tokens=2)
        assert len(backend._state._by_width) <= 2 * (tiny_bundle.tree.size + 1)
        assert len(backend._windows) <= 4

"""Threads and event loops that share an engine or a service, and signal handlers that interrupt a step."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from medusa_runtime import (
    Bundle,
    GenerationStream,
    MedusaEngine,
    MedusaError,
    MedusaService,
    RequestError,
    SamplingParams,
)
from medusa_runtime.text.tokenizer import Tokenizer
from support.gate import Gate

PROMPTS = [[(7 * i * i + 3 * j) % 101 for i in range(13 + j)] for j in range(6)]
POLICIES = [{}, {"sampling": SamplingParams(temperature=0.9, seed=7)}]


@pytest.fixture
def engine(tiny_bundle: Bundle) -> Iterator[MedusaEngine]:
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine:
        yield engine


def expected_of(engine: MedusaEngine) -> dict[tuple[int, int], tuple[int, ...]]:
    places = itertools.product(range(len(PROMPTS)), range(len(POLICIES)))
    return {
        (j, k): engine.generate(PROMPTS[j], max_new_tokens=30, tree_size=4, **POLICIES[k]).token_ids for j, k in places
    }


def test_threads_that_share_an_engine(engine: MedusaEngine) -> None:
    """Each gets its own answer. A newer request must not empty the row during a step of an older one."""
    expected = expected_of(engine)

    def answer(number: int) -> bool:
        place = (number % 6, number % 2)
        options = {"max_new_tokens": 30, "tree_size": (1, 4, 9)[number % 3], "prefill_chunk": 5} | POLICIES[place[1]]
        return engine.generate(PROMPTS[place[0]], **options).token_ids == expected[place]

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(answer, range(24))) == 24


def test_streams_in_threads_that_share_an_engine(engine: MedusaEngine) -> None:
    """All delivered tokens are right. The newest stream goes on, and older ones raise an error."""
    expected = expected_of(engine)
    overtaken: list[str] = []

    def answer(number: int) -> bool:
        place = (number % 6, number % 2)
        received: list[int] = []
        try:
            for chunk in engine.stream(PROMPTS[place[0]], max_new_tokens=30, tree_size=4, **POLICIES[place[1]]):
                received += chunk.token_ids
        except RequestError as error:
            overtaken.append(str(error))
            return tuple(received) == expected[place][: len(received)]
        return tuple(received) == expected[place]

    with ThreadPoolExecutor(3) as pool:
        assert sum(pool.map(answer, range(60))) == 60
    assert all("begun another request" in message for message in overtaken)
    assert engine.generate(PROMPTS[0], max_new_tokens=30).token_ids == expected[0, 0]


def test_measuring_in_two_threads(tiny_bundle: Bundle) -> None:
    with MedusaEngine.load(tiny_bundle.folder, threads=1) as engine, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: engine.generate(PROMPTS[0], max_new_tokens=20).token_ids, range(4)))
        assert answers == [engine.generate(PROMPTS[0], max_new_tokens=20, tree_size=1).token_ids] * 4


def test_closing_waits_for_the_step_that_runs(engine: MedusaEngine) -> None:
    inside, leave = threading.Event(), threading.Event()
    step = engine.backend.step

    def slow(*arguments: Any) -> Any:
        inside.set()
        assert leave.wait(30)
        assert engine.backend.capacity > 0  # no thread has closed it meanwhile
        return step(*arguments)

    engine.backend.step = slow
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(engine.generate, PROMPTS[0], max_new_tokens=30, tree_size=4)
        assert inside.wait(30)
        closing = pool.submit(engine.close)
        with pytest.raises(TimeoutError):
            closing.result(0.05)
        leave.set()
        closing.result(30)
        with pytest.raises(RequestError, match="engine is closed"):
            answer.result(30)
    assert engine.state == "closed" and engine.failure is None
    assert engine.backend.capacity == 0


def test_a_stream_that_several_threads_read(engine: MedusaEngine) -> None:
    expected = engine.generate(PROMPTS[0], max_new_tokens=200, tree_size=4).token_ids
    stream = engine.stream(PROMPTS[0], max_new_tokens=200, tree_size=4)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda _: [chunk.token_ids for chunk in stream], range(4)))
    assert sorted(itertools.chain(*itertools.chain(*parts))) == sorted(expected)
    assert stream.result().token_ids == expected


@pytest.mark.parametrize("action", ["generate", "stream", "next", "close"])
def test_a_call_that_interrupts_a_step(engine: MedusaEngine, action: str) -> None:
    """A signal handler calls the engine in the same thread. The call must neither wait nor disturb the step."""
    expected = engine.generate(PROMPTS[0], max_new_tokens=30, tree_size=4).token_ids
    step, errors = engine.backend.step, []
    stream: GenerationStream = engine.stream(PROMPTS[0], max_new_tokens=30, tree_size=4)
    actions: dict[str, Callable[[], object]] = {
        "generate": lambda: engine.generate(PROMPTS[1]),
        "stream": lambda: engine.stream(PROMPTS[1]),
        "next": lambda: next(stream),
        "close": engine.close,
    }

    def interrupted(*arguments: Any) -> Any:
        try:
            actions[action]()
        except RequestError as error:
            errors.append(str(error))
        return step(*arguments)

    next(stream)
    engine.backend.step = interrupted
    if action == "close":
        chunk = next(stream)  # of the step that was running
        assert expected[1 : 1 + len(chunk.token_ids)] == chunk.token_ids
        with pytest.raises(RequestError, match="engine is closed"):
            next(stream)
        assert engine.backend.capacity == 0
    else:
        assert stream.result().token_ids == expected
        assert all("in the middle of a step" in message for message in errors) and errors


def test_a_backend_that_fails_and_recovers(engine: MedusaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate(PROMPTS[0], max_new_tokens=9, tree_size=4).token_ids

    def fail(*_: object) -> None:
        raise OSError("no such device")

    with monkeypatch.context() as patch:
        patch.setattr(engine.backend, "step", fail)
        with pytest.raises(MedusaError, match="no such device"):
            engine.generate(PROMPTS[0], tree_size=4)
        assert engine.state == "ready"  # the row could be reset
        patch.setattr(engine.backend, "reset", fail)
        for _ in range(2):
            with pytest.raises(MedusaError, match="no such device"):
                engine.generate(PROMPTS[0], tree_size=4)
            assert engine.state == "failed" and isinstance(engine.failure, OSError)
    assert engine.generate(PROMPTS[0], max_new_tokens=9, tree_size=4).token_ids == expected
    assert (engine.state, engine.failure) == ("ready", None)


def test_a_session_takes_one_turn_at_a_time(tiny_bundle: Bundle) -> None:
    """Of two turns at the same time, one would be lost."""
    gate = Gate(tiny_bundle, rows=2)
    with MedusaService(tiny_bundle, gate, Tokenizer.load(tiny_bundle.listed), tree_size=4) as service:
        session = service.session()
        gate.open.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(session.send, "Hi", max_new_tokens=5)
            assert gate.entered.acquire(timeout=30)
            with pytest.raises(RequestError, match="one message at a time"):
                session.send("And", max_new_tokens=5)
            with pytest.raises(RequestError, match="one message at a time"):
                asyncio.run(session.asend("And", max_new_tokens=5))
            gate.open.set()
            first.result(30)
        assert [message["content"] for message in session.messages[::2]] == ["Hi"]
        with pytest.raises(RequestError):  # a turn that fails ends, too
            session.send("x", max_new_tokens=-1)
        session.send("And", max_new_tokens=5)
        assert [message["content"] for message in session.messages[::2]] == ["Hi", "And"]


def test_a_session_in_an_event_loop(tiny_bundle: Bundle) -> None:
    async def both() -> list[object]:
        turns = (session.asend(text, max_new_tokens=5) for text in ("One", "Two"))
        return await asyncio.gather(*turns, return_exceptions=True)

    with MedusaService.load(tiny_bundle.folder, rows=2, threads=1, tree_size=4) as service:
        session = service.session()
        outcomes = asyncio.run(both())
        assert [isinstance(outcome, RequestError) for outcome in outcomes] == [False, True]
        assert [message["content"] for message in session.messages[::2]] == ["One"]


def test_a_handle_that_several_threads_read(tiny_bundle: Bundle) -> None:
    with MedusaService.load(tiny_bundle.folder, rows=2, threads=1, tree_size=4) as service:
        expected = service.generate(PROMPTS[0], max_new_tokens=200).token_ids
        handle = service.submit(PROMPTS[0], max_new_tokens=200)

        async def read() -> list[tuple[int, ...]]:
            return [chunk.token_ids async for chunk in handle]

        with ThreadPoolExecutor(4) as pool:
            reading = [pool.submit(lambda: [chunk.token_ids for chunk in handle]) for _ in range(2)]
            reading += [pool.submit(asyncio.run, read()) for _ in range(2)]
            parts = [future.result(30) for future in reading]
        assert sorted(itertools.chain(*itertools.chain(*parts))) == sorted(expected)
        assert handle.result().token_ids == expected


def test_a_tokenizer_in_many_threads(tiny_bundle: Bundle) -> None:
    texts = [f"Hello {number} world " * (number % 5 + 1) for number in range(64)]
    alone = Tokenizer.load(tiny_bundle.listed)
    assert alone is not None
    expected = [(ids := alone.encode(text), alone.decode(ids), alone.encode_chat(_said(text))) for text in texts]
    shared = Tokenizer.load(tiny_bundle.listed)
    assert shared is not None

    def work(text: str) -> tuple[list[int], str, list[int]]:
        return (ids := shared.encode(text)), shared.decode(ids), shared.encode_chat(_said(text))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, texts)) == expected


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]

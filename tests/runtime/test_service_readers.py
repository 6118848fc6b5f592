"""Readers of a service's answers: slow ones, failing ones, and those that stop reading."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator

import pytest

from medusa_runtime import (
    Bundle,
    CallbackError,
    Chunk,
    MedusaEngine,
    MedusaService,
    Metrics,
)
from support.gate import Gate
from support.prompts import PROMPT


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


def test_readers_wake_together_when_the_next_step_runs(tiny_bundle: Bundle, gate: Gate) -> None:
    """Readers that woke while chunks are delivered would hold up the service's thread, each for itself."""
    seen: list[str] = []

    class Seen(Metrics):
        def load(self, waiting: int, running: int) -> None:
            seen.append("(")

    gate.fail = lambda *_: seen.append(")")
    gate.open.clear()
    with MedusaService(tiny_bundle, gate, None, tree_size=1, metrics=Seen()) as service:
        handles = [service.submit([number + 5], max_new_tokens=9, ignore_eos=True) for number in range(2)]
        for number, handle in enumerate(handles):
            handle.listen(lambda name=str(number): seen.append(name))
        seen.clear()
        gate.open.set()
        assert all(len(handle.result(30).token_ids) == 9 for handle in handles)
    assert "".join(seen).count("(01)") >= 6


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

"""The answers of a request while they come: what waits is given out in one piece, in order, and to its end."""

from __future__ import annotations

import asyncio
import re
import threading
from contextlib import ExitStack

import pytest

from medusa_runtime import BackendError, Chunk, GenerationResult, MedusaError, RequestHandle, Stats
from medusa_runtime.server.generation import Choice, Delta, Generation
from medusa_runtime.server.ids import random_hex
from medusa_runtime.server.output.parts import PlainParser


def generation(count: int) -> Generation:
    handles = [RequestHandle(Stats(), lambda _: None) for _ in range(count)]
    choices = [Choice(index, 0, handle, PlainParser()) for index, handle in enumerate(handles)]
    return Generation(choices, ExitStack())


def end(handle: RequestHandle, text: str) -> None:
    handle.end(GenerationResult(text, (), "stop", handle.stats))


def test_steps_that_wait_are_given_out_in_one() -> None:
    async def run() -> None:
        made = generation(1)
        handle = made.choices[0].handle
        for number in range(3):
            handle.put(Chunk(str(number), (number,), (-1.0 * number,)))
        deltas = made.deltas(60)
        (delta,) = await anext(deltas)
        assert (delta.content, [*delta.token_ids], [*(delta.logprobs or ())]) == ("012", [0, 1, 2], [0, -1, -2])
        handle.put(Chunk("3", (3,)))
        end(handle, "0123")
        (rest,) = [found async for found in deltas]
        assert [delta.content for delta in rest] == ["3", ""]
        assert rest[-1].result is not None

    asyncio.run(run())


def test_answers_of_one_request_come_as_they_are_and_quiet_time_is_told() -> None:
    async def run() -> None:
        made = generation(2)
        first, second = (choice.handle for choice in made.choices)
        deltas = made.deltas(0.01)
        assert await anext(deltas) == []
        second.put(Chunk("b", (1,)))
        end(second, "b")
        first.put(Chunk("a", (1,)))
        first.wake()
        found: list[Delta] = []
        while len(found) < 3:
            found += await anext(deltas)
        assert sorted((delta.choice.index, delta.content) for delta in found) == [(0, "a"), (1, ""), (1, "b")]
        end(first, "a")
        last = [delta async for found in deltas for delta in found]
        assert [delta.choice.index for delta in last] == [0] and last[0].result is not None

    asyncio.run(run())


def test_an_error_comes_behind_the_steps_before_it() -> None:
    async def run() -> None:
        made = generation(1)
        handle = made.choices[0].handle
        handle.put(Chunk("a", (1,)))
        failure: MedusaError = BackendError("lost")
        handle.end(failure)
        deltas = made.deltas(60)
        (delta,) = await anext(deltas)
        assert delta.content == "a"
        with pytest.raises(BackendError, match="lost"):
            await anext(deltas)

    asyncio.run(run())


def test_a_reader_that_a_listener_wakes_finds_the_handle_free() -> None:
    """With the lock still held, the reader would wait for the service's thread and hold up the event loop."""
    handle = generation(1).choices[0].handle
    found: list[list[Chunk]] = []

    def wake() -> None:
        reader = threading.Thread(target=lambda: found.append(handle.take()))
        reader.start()
        reader.join(10)

    handle.listen(wake)
    chunk = Chunk("a", (1,))
    handle.put(chunk)
    assert found == [[]]
    handle.wake()
    end(handle, "a")
    assert found == [[], [chunk], []]


def test_identifiers_have_as_many_digits_as_asked_for() -> None:
    found = {random_hex(9) for _ in range(100)}
    assert len(found) == 100 and all(re.fullmatch("[0-9a-f]{9}", digits) for digits in found)


def test_the_event_loop_is_woken_once_for_a_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        handle = generation(1).choices[0].handle
        loop, woken = asyncio.get_running_loop(), list[object]()
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda work: (woken.append(work), call(work)))
        result = asyncio.create_task(handle.aresult())
        for number in range(5):
            await asyncio.sleep(0)
            handle.put(Chunk(str(number), (number,)))
            handle.wake()
        end(handle, "01234")
        assert (await result).text == "01234" and len(woken) == 1

    asyncio.run(run())

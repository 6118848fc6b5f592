"""The event loop goes on while a prompt is checked and encoded."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from medusa_runtime import Bundle, MedusaService, Metrics, RequestError, Stats
from medusa_runtime.text.tokenizer import Tokenizer

PROMPT = "Hello"
who: contextvars.ContextVar[str] = contextvars.ContextVar("who")


class Waiting:
    """A tokenizer that waits for an event before it encodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.begun, self.let_go = threading.Event(), threading.Event()
        self.who = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        self.who = who.get("nobody")
        self.begun.set()
        assert self.let_go.wait(60)
        return self._tokenizer.encode(text, **options)


class Ends(Metrics):
    """Counts the ends of requests."""

    def __init__(self) -> None:
        self.ended_with: list[str] = []

    def ended(self, reason: str, stats: Stats) -> None:
        self.ended_with.append(reason)


@pytest.fixture
def metrics() -> Ends:
    return Ends()


@pytest.fixture
def service(tiny_bundle: Bundle, metrics: Ends) -> Iterator[MedusaService]:
    with MedusaService.load(tiny_bundle.folder, rows=2, threads=1, tree_size=4, metrics=metrics) as service:
        service.tokenizer = Waiting(service.tokenizer)  # type: ignore[assignment, arg-type]
        yield service


async def begun(tokenizer: Any) -> None:
    while not tokenizer.begun.is_set():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("kind", ["agenerate", "astream", "asubmit"])
def test_the_loop_goes_on_while_a_prompt_is_encoded(service: MedusaService, kind: str) -> None:
    tokenizer: Any = service.tokenizer

    async def answer() -> tuple[int, ...]:
        if kind == "agenerate":
            return (await service.agenerate(PROMPT, max_new_tokens=9)).token_ids
        if kind == "asubmit":
            return (await (await service.asubmit(PROMPT, max_new_tokens=9)).aresult()).token_ids
        return tuple([token async for chunk in service.astream(PROMPT, max_new_tokens=9) for token in chunk.token_ids])

    async def side_by_side() -> tuple[int, ...]:
        who.set("Ada")
        task = asyncio.create_task(answer())
        await begun(tokenizer)
        assert not task.done()
        tokenizer.let_go.set()
        return await task

    assert asyncio.run(side_by_side()) == service.generate(tokenizer.encode(PROMPT), max_new_tokens=9).token_ids


def test_a_thread_that_encodes_has_the_context_of_its_task(service: MedusaService) -> None:
    tokenizer: Any = service.tokenizer
    tokenizer.let_go.set()

    async def answer() -> None:
        who.set("Ada")
        await service.agenerate(PROMPT, max_new_tokens=2)

    asyncio.run(answer())
    assert tokenizer.who == "Ada"


def test_a_task_that_is_cancelled_while_its_prompt_is_encoded_leaves_nothing(
    service: MedusaService, metrics: Ends
) -> None:
    tokenizer: Any = service.tokenizer
    ended = metrics.ended_with

    async def give_up() -> None:
        task = asyncio.create_task(service.agenerate(PROMPT, max_new_tokens=400))
        await begun(tokenizer)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        tokenizer.let_go.set()

    asyncio.run(give_up())  # the end of the loop waits for its threads
    assert service.drain(30)
    assert ended == ["RequestCancelledError"]


def test_a_refusal_reaches_the_task(service: MedusaService) -> None:
    service.tokenizer.let_go.set()  # type: ignore[union-attr]
    for prompt, options in ((None, {}), ("x" * 5_000_000, {}), (PROMPT, {"stop": [""]})):
        with pytest.raises(RequestError):
            asyncio.run(service.agenerate(prompt, **options))
    with pytest.raises(TypeError, match="no option 'speed'"):
        asyncio.run(service.agenerate(PROMPT, speed=3))

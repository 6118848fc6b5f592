"""The answers of a service: each is that of the request alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from medusa_runtime import (
    Bundle,
    MedusaEngine,
    MedusaService,
    RequestError,
)
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.decoding.sequence import TokenSequence
from medusa_runtime.text.stream import TextStream
from medusa_runtime.text.tokenizer import Tokenizer
from support.gate import Gate
from support.prompts import PROMPT
from support.rig import KINDS, Rig, rig_of
from support.stock import Stock


@pytest.fixture(scope="module", params=KINDS)
def rig(request: pytest.FixtureRequest, tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig_of(request.param, tiny_bundle, tmp_path_factory.mktemp("engine")) as rig:
        yield rig


@pytest.fixture(scope="module")
def shared(tiny_bundle: Bundle, rig: Rig) -> Iterator[MedusaService]:
    tokenizer = Tokenizer.load(tiny_bundle.folder)
    with MedusaService(tiny_bundle, rig.backend(), tokenizer, tree_size=4) as service:
        yield service


def random_request(rng: np.random.Generator) -> tuple[list[int], dict[str, int]]:
    return rng.integers(1, 101, rng.integers(1, 90)).tolist(), {"max_new_tokens": int(rng.integers(1, 40))}


@pytest.mark.parametrize("size", [1, 4, 9])
def test_requests_side_by_side_answer_as_alone(tiny_bundle: Bundle, engine: MedusaEngine, rig: Rig, size: int) -> None:
    rng = np.random.default_rng(size)
    requests = [random_request(rng) for _ in range(40)]
    with MedusaService(tiny_bundle, rig.backend(), None, tree_size=size, prefill_chunk=7) as service:
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
        assert set(service._thread.loop.sizes.choice.sizes) == {1, 2, 3}


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


@pytest.mark.slow
def test_an_fp16_bundle(stock: Stock) -> None:
    """A bundle in fp16 has no derived graph for several rows."""
    bundle = stock.export(dtype="float16").bundle
    engine = MedusaEngine.load(bundle.folder, threads=1)
    with MedusaService.load(bundle.folder, rows=3, threads=1, tree_size=4) as service:
        prompts = [[5 + i] * (10 + 7 * i) for i in range(5)]
        handles = [service.submit(prompt, max_new_tokens=30) for prompt in prompts]
        for prompt, handle in zip(prompts, handles, strict=True):
            assert handle.result(30).token_ids == engine.generate(prompt, max_new_tokens=30).token_ids


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


def test_rows_far_apart_step_alone(tiny_bundle: Bundle, engine: MedusaEngine) -> None:
    """A step runs over the rows that take part and no others, independent of their places."""
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


def test_a_long_row_steps_by_itself(tiny_bundle: Bundle, engine: MedusaEngine) -> None:
    gate = Gate(tiny_bundle, rows=2)
    with MedusaService(tiny_bundle, gate, None, tree_size=4, prefill_chunk=8) as service:
        check_long_row(service, gate, engine)


def check_long_row(service: MedusaService, gate: Gate, engine: MedusaEngine) -> None:
    service._thread.loop.runner.room.worth_a_step = 100
    seen: list[list[int]] = []
    gate.fail = lambda size, prompts, rows: seen.append(sorted(rows)) if not prompts else None
    prompts = [[9] * 300, [3] * 10]
    handles = [service.submit(prompt, max_new_tokens=60) for prompt in prompts]
    for prompt, handle in zip(prompts, handles, strict=True):
        assert handle.result(30).token_ids == engine.generate(prompt, max_new_tokens=60).token_ids
    assert [0, 1] not in seen
    seen.clear()
    service._thread.loop.runner.room.worth_a_step = 1000
    handles = [service.submit(prompt, max_new_tokens=60) for prompt in prompts]
    assert all(handle.result(30) for handle in handles)
    assert [0, 1] in seen

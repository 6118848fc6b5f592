"""Long prompts in a service: the delays of other requests."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from medusa_runtime import (
    MedusaService,
)
from support.gate import Gate
from support.prompts import PROMPT


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
    """Between two steps of a running stream there is one chunk or one move, never both."""
    events: list[str] = []
    gate.fail = lambda size, prompts, rows: events.append("chunk" if prompts else "decode")

    def watched(rows: Sequence[int], capacity: int, at_most: int) -> bool:
        done = prepare_arrange(rows, capacity, at_most)
        if not done:
            events.append("move")
        return done

    prepare_arrange, gate.inner.prepare_arrange = gate.inner.prepare_arrange, watched
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


def test_a_long_prompt_moves_in_parts(service: MedusaService, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row moves to a larger block, and to the other rows once it decodes. Its text is right."""
    monkeypatch.setattr("medusa_runtime.decoding.room.MOVED_AT_ONCE", 60)
    monkeypatch.setattr("medusa_runtime.decoding.loop.MOVED_BESIDES", 50)
    expected = service.generate([4] * 300, max_new_tokens=30).token_ids
    steps: list[tuple[int, ...]] = []
    gate.fail = lambda size, prompts, rows: steps.append(("chunk", *rows) if prompts else tuple(sorted(rows)))
    parts: list[tuple[int, ...]] = []
    prepare_arrange = gate.inner.prepare_arrange

    def watched(rows: Sequence[int], capacity: int, at_most: int) -> bool:
        done = prepare_arrange(rows, capacity, at_most)
        if not done:
            steps.append("move")
            parts.append(tuple(rows))
        return done

    gate.inner.prepare_arrange = watched
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

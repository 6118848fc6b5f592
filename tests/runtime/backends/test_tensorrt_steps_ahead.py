"""Engines over the TensorRT backend on a stand-in for the GPU: steps ahead of the host, and lookup hits."""

from __future__ import annotations

import pytest

from medusa_runtime import MedusaEngine, RequestError
from medusa_runtime.backends.tensorrt.backend import TensorRTBackend
from medusa_runtime.decoding.lookup import TokenLookup
from support.decoding import TREE
from support.machine import PROMPTS, Machine


def logged(backend: TensorRTBackend) -> list[str]:
    """A log of calls of a backend, from now on."""
    log: list[str] = []
    for name in ("submit", "collect", "reset"):
        call = getattr(backend, name)
        setattr(backend, name, lambda *given, call=call, name=name: (log.append(name), call(*given))[1])
    return log


@pytest.mark.parametrize("size", [1, 4, 9])
def test_the_engine_submits_steps_ahead(machine: Machine, expected: list[list[int]], size: int) -> None:
    """No step is submitted behind max_new_tokens. Lookup is off, as its steps wait for the last tokens."""
    backend = machine.backend()
    engine = MedusaEngine(machine.bundle, backend, None)
    log = logged(backend)
    for count in (1, 2, 5, 6, 40):
        log.clear()
        result = engine.generate(PROMPTS[0], max_new_tokens=count, tree_size=size, lookup=False)
        assert list(result.token_ids) == expected[0][:count]
        steps = [call for call in log if call != "reset"][2:]  # behind the prompt, one step that is collected at once
        assert steps.count("submit") == steps.count("collect") == result.stats.steps
    assert steps[:5] == ["submit", "submit", "collect", "submit", "collect"]
    assert steps[-2:] == ["submit", "collect"] or steps[-3:] == ["submit", "collect", "collect"]
    assert backend.lengths[0] - len(PROMPTS[0]) < 40 + min(size, TREE.max_depth + 1)


def test_a_step_ahead_of_a_stop_is_discarded(machine: Machine, expected: list[list[int]]) -> None:
    backend = machine.backend()
    engine = MedusaEngine(machine.bundle, backend, None)
    log = logged(backend)
    stop = expected[0][7]
    until = expected[0][: expected[0].index(stop) + 1]
    for size in (1, 4, 9):
        log.clear()
        result = engine.generate(PROMPTS[0], max_new_tokens=40, tree_size=size, stop_token_ids=[stop], lookup=False)
        assert list(result.token_ids) == until
        assert result.finish_reason == "stop"
        assert log.count("submit") == log.count("collect") + 1
        # the next request begins with an empty row
        assert (
            list(engine.generate(PROMPTS[1], max_new_tokens=20, tree_size=size, lookup=False).token_ids)
            == expected[1][:20]
        )
    stream = engine.stream(PROMPTS[0], max_new_tokens=40, tree_size=9, lookup=False)
    next(stream), next(stream)  # left with a step in flight
    assert list(engine.generate(PROMPTS[2], max_new_tokens=20, tree_size=9, lookup=False).token_ids) == expected[2][:20]
    ran = log.count("submit")
    with pytest.raises(RequestError, match="begun another request"):
        next(stream)
    assert log.count("submit") == ran
    engine.stream(PROMPTS[0], max_new_tokens=40, tree_size=9, lookup=False).__next__()
    engine.close()
    assert not machine.cuda.blocks


def test_lookup_hits_go_to_the_device(
    machine: Machine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right lookup hits fill each step, independent of the heads' draft."""
    backend = machine.backend()
    engine = MedusaEngine(machine.bundle, backend, None)
    log = logged(backend)
    text = [*PROMPTS[0], *expected[0]]
    monkeypatch.setattr(TokenLookup, "find", lambda self, count: text[len(self._tokens) :][:count])
    for size in (4, 9):
        log.clear()
        result = engine.generate(PROMPTS[0], max_new_tokens=40, tree_size=size)
        assert list(result.token_ids) == expected[0][:40]
        deep = sum(group[0] < size for group in TREE.best_path_siblings)
        assert result.stats.steps == -(-39 // (1 + deep))
        assert ["submit", "submit"] not in [log[i : i + 2] for i in range(len(log))]

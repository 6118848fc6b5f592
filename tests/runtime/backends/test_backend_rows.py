"""Rows of a backend: some take part in a step, others keep their state; a row is cut, and copied to another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medusa_export.step.eager import EagerBackend
from medusa_runtime.backends.base import Backend, can_copy_rows
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.compiled import CompiledEngine
from support.decoding import TREE, greedy
from support.machine import PROMPTS, Machine
from support.on_host import OnnxRuntimeOnHost
from support.stock import Stock
from support.tiny_models import tiny_model

ROWS = 3
COUNT = 24
CAPACITY = 128
Open = Callable[[], Backend]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("eager", marks=pytest.mark.slow),
        *("onnxruntime", "onnxruntime, standard", "onnxruntime-cuda", "tensorrt"),
    ],
)
def opened(request: pytest.FixtureRequest, stock: Stock, tiny_engine: CompiledEngine) -> Iterator[Backend]:
    exported = stock.export()
    bundle = exported.bundle
    kinds: dict[str, Open] = {
        "eager": lambda: EagerBackend(exported.step, rows=ROWS),
        "onnxruntime": lambda: OnnxRuntimeBackend(bundle, rows=ROWS, threads=1),
        "onnxruntime, standard": lambda: OnnxRuntimeBackend(bundle, rows=ROWS, threads=1, graph=bundle.graph),
        "onnxruntime-cuda": lambda: OnnxRuntimeOnHost(bundle, rows=ROWS, threads=1),
        "tensorrt": lambda: Machine(bundle, tiny_engine).backend(ROWS),
    }
    with closing(kinds[request.param]()) as backend:
        backend.reserve(CAPACITY)
        yield backend


@pytest.fixture
def backend(opened: Backend) -> Backend:
    for row in range(ROWS):
        opened.reset(row)
    return opened


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    model = tiny_model("llama")
    return [greedy(model, prompt, COUNT + TREE.size) for prompt in PROMPTS]


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_in_turns_give_the_tokens_of_transformers(
    backend: Backend, expected: list[list[int]], data: st.DataObject
) -> None:
    """Some rows take part in each step. They prefill in chunks, or verify their drafts."""
    for row in range(ROWS):
        backend.reset(row)
    left = [list(prompt) for prompt in PROMPTS]
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for _ in range(24):
        open_rows = [row for row in range(ROWS) if len(tokens[row]) < COUNT]
        if not open_rows:
            break
        rows = data.draw(st.lists(st.sampled_from(open_rows), min_size=1, unique=True))
        chunks = {row: left[row][: data.draw(st.integers(1, 9))] for row in rows if left[row]}
        size = max([data.draw(st.sampled_from([1, 4, 9])), *map(len, chunks.values())])
        kept = [backend.drafts[row].copy() for row in range(ROWS)]
        lengths = np.array(backend.lengths)
        result = backend.step(size, chunks, rows)
        for row in range(ROWS):
            if row not in rows:
                assert backend.lengths[row] == lengths[row]
                assert backend.drafts[row].tolist() == kept[row].tolist()
                continue
            left[row] = left[row][len(chunks.get(row, ())) :]
            if not left[row]:
                tokens[row] += result.emitted(row)[0]
    for row in range(ROWS):
        assert tokens[row] == expected[row][: len(tokens[row])]


def test_lengths_show_later_changes(backend: Backend) -> None:
    """The scheduler reads them again after each admission."""
    lengths = backend.lengths
    backend.step(13, {0: PROMPTS[0]}, [0])
    assert lengths.tolist() == [13, 0, 0]
    backend.truncate(0, 5)
    assert lengths.tolist() == [5, 0, 0]
    if can_copy_rows(backend):
        backend.copy(0, 2, 4)
        assert lengths.tolist() == [5, 0, 4]
    backend.reset(0)
    assert lengths[0] == 0


@pytest.mark.parametrize(
    "length", [0, 9, 15, *(pytest.param(value, marks=pytest.mark.slow) for value in (1, 3, 12, 13, 16))]
)
def test_a_truncated_row_goes_on_with_another_text(backend: Backend, length: int) -> None:
    """The prompt of 13 tokens has been continued; the rest of the new one is prefilled behind what is kept."""
    text = list(PROMPTS[0])
    text += backend.step(13, {0: text}, [0]).emitted(0)[0]
    while len(text) < 20:
        text += backend.step(9, {}, [0]).emitted(0)[0]
    other = backend.step(20, {1: PROMPTS[2]}, [1]).emitted(1)[0]
    backend.truncate(0, length)
    assert backend.lengths.tolist() == [length, 20, 0]
    rest = PROMPTS[1]
    expected = greedy(tiny_model("llama"), [*text[:length], *rest], COUNT)
    tokens = backend.step(9, {0: rest}, [0]).emitted(0)[0]
    while len(tokens) < COUNT:
        result = backend.step(9, {}, [0, 1])
        tokens += result.emitted(0)[0]
        other += result.emitted(1)[0]
    assert tokens[:COUNT] == expected
    assert other == greedy(tiny_model("llama"), PROMPTS[2], len(other))


@pytest.mark.parametrize(
    "length", [0, 9, 16, *(pytest.param(value, marks=pytest.mark.slow) for value in (1, 3, 12, 13))]
)
def test_a_row_takes_over_the_first_entries_of_another(backend: Backend, length: int) -> None:
    if not can_copy_rows(backend):
        pytest.skip("it copies no rows")
    text = list(PROMPTS[0])
    text += backend.step(13, {0: text}, [0]).emitted(0)[0]
    while len(text) < 20:
        text += backend.step(9, {}, [0]).emitted(0)[0]
    backend.step(20, {1: PROMPTS[2]}, [1])
    backend.copy(0, 1, length)
    assert backend.lengths.tolist() == [len(text) - 1, length, 0]
    rest = PROMPTS[1]
    expected = greedy(tiny_model("llama"), [*text[:length], *rest], COUNT)
    tokens = backend.step(9, {1: rest}, [1]).emitted(1)[0]
    while len(tokens) < COUNT:
        result = backend.step(9, {}, [0, 1])
        text += result.emitted(0)[0]
        tokens += result.emitted(1)[0]
    assert tokens[:COUNT] == expected
    assert text[13:] == greedy(tiny_model("llama"), PROMPTS[0], len(text) - 13)

"""Scrubbing of rows by the TensorRT backend, on a stand-in for the GPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_runtime import BackendError, Bundle, MedusaEngine
from medusa_runtime.backends.tensorrt.backend import TensorRTBackend
from medusa_runtime.bundles.compiled import CompiledEngine
from medusa_runtime.bundles.contract import fixed_shape
from support.decoding import TREE
from support.machine import PROMPTS, Machine


def device_state(machine: Machine, backend: TensorRTBackend) -> dict[str, np.ndarray]:
    """Caches and pending entries of all rows on the device."""
    sizes = {"batch": backend.rows, "capacity": backend.capacity}
    return {
        spec.name: machine.cuda.array(backend._buffers.address[spec.name], fixed_shape(spec, sizes), spec.dtype)
        for spec in machine.bundle.inputs
        if spec.name.startswith(("past", "pending"))
    }


@settings(max_examples=10)
@given(length=st.integers(0, 30), row=st.integers(0, 1), steps=st.integers(0, 3))
def test_a_scrubbed_row_holds_its_committed_entries_and_zeros(
    tiny_bundle: Bundle, tiny_engine: CompiledEngine, length: int, row: int, steps: int
) -> None:
    """Other values are zeroed. The row decodes as before, and the other row keeps every bit."""
    machine, twin = (Machine(tiny_bundle, tiny_engine) for _ in range(2))
    ours, theirs = machine.backend(2), twin.backend(2)
    depth, text = TREE.max_depth, (PROMPTS[0] * 3)[:length]
    for backend in (ours, theirs):
        backend.step(13, {1 - row: PROMPTS[1]})
        backend.reset(row)  # drops the entries that it decoded beside the other row
        if text:
            backend.step(max(length, 4), {row: text})
            for _ in range(steps):
                backend.step(9)
    state = device_state(machine, ours)
    kept = int(ours.lengths[row])
    held = np.arange(ours.capacity)
    committed = (held >= depth) & (held < max(kept, depth))  # the last of them are pending
    for name, array in state.items():
        if name == "pending_0":
            array[row][:, : max(depth - kept, 0)] = np.nan
        else:
            array[row][:, ~committed] = np.nan
    others = {name: array[1 - row].copy() for name, array in state.items()}
    before = {name: array[row].copy() for name, array in state.items()}
    ours.scrub(row)
    for name, array in state.items():
        np.testing.assert_array_equal(array[1 - row], others[name])
        assert np.array_equal(array[row], np.nan_to_num(before[name], nan=0.0))
    chunks = {} if kept else {row: PROMPTS[2][:8]}
    for size in (9, 1, 4):
        step, other = ours.step(size, chunks), theirs.step(size, chunks)
        assert [step.emitted(at) for at in range(2)] == [other.emitted(at) for at in range(2)]
        chunks = {}
    for backend in (ours, theirs):
        backend.close()


def test_steps_under_way_are_collected_before_a_row_is_scrubbed(machine: Machine) -> None:
    backend = machine.backend()
    backend.step(13, {0: PROMPTS[0]})
    backend.submit(4)
    with pytest.raises(BackendError, match="collect them before"):
        backend.scrub(0)
    backend.collect()
    backend.scrub(0)


@pytest.mark.parametrize("lookup", [False, True])
def test_what_an_earlier_request_left_does_not_reach_the_next(
    machine: Machine, expected: list[list[int]], lookup: bool
) -> None:
    """Runs in the engine. Without lookup it submits steps ahead."""
    backend = machine.backend()
    with MedusaEngine(machine.bundle, backend, None) as engine:
        engine.generate(PROMPTS[1], max_new_tokens=10)
        for array in device_state(machine, backend).values():
            array[...] = np.nan
        result = engine.generate(PROMPTS[0], max_new_tokens=40, tree_size=9, lookup=lookup)
        assert list(result.token_ids) == expected[0]
        assert machine.cuda.calls["cudaMemset2DAsync"]

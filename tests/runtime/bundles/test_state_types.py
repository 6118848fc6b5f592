"""States of several types: their groups, their tensors, and the bytes that they take."""

from __future__ import annotations

from typing import Any

from medusa_runtime.bundles.contract import TensorSpec, pending_specs, step_inputs, step_outputs
from medusa_runtime.bundles.states import State, groups_of, with_margin

MARGIN = 2


def states() -> tuple[State, ...]:
    """Keys in 8 bits with a scale per head, and values in the bundle's type."""
    return with_margin(
        [
            State("key_0", "kv", (3, 16), 0, (0,), dtype="int8"),
            State("value_0", "kv", (3, 16), 0, (0,)),
            State("key_scale_0", "scale", (3, 1), 0, (0,), dtype="float32"),
            State("key_1", "kv", (3, 16), 0, (1,), dtype="int8"),
        ],
        MARGIN,
    )


def test_states_of_one_shape_and_type_are_a_group() -> None:
    groups = groups_of(states())
    assert [[state.name for state in group.states] for group in groups] == [
        ["key_0", "key_1"],
        ["value_0"],
        ["key_scale_0"],
    ]
    assert [group.dtype for group in groups] == ["int8", None, "float32"]
    assert [group.pending for group in groups] == ["pending_0", "pending_1", "pending_2"]


def test_each_group_has_pending_entries_of_its_type() -> None:
    assert pending_specs(states(), "float16") == (
        TensorSpec("pending_0", "int8", ("batch", 6, MARGIN, 16)),
        TensorSpec("pending_1", "float16", ("batch", 3, MARGIN, 16)),
        TensorSpec("pending_2", "float32", ("batch", 3, MARGIN, 1)),
    )


def test_inputs_and_outputs_have_the_types_of_their_states() -> None:
    common: dict[str, Any] = {"vocab_size": 9, "dtype": "float16", "sampling": False, "top_logprobs": False}
    inputs = step_inputs(states(), constraints=False, **common)
    outputs = step_outputs(states(), tree_depth=MARGIN, tree_size=3, **common)
    past = {spec.name: spec.dtype for spec in inputs if spec.name.startswith("past_")}
    present = {spec.name: spec.dtype for spec in outputs if spec.name.startswith("present_")}
    assert list(past.values()) == list(present.values()) == ["int8", "float16", "float32", "int8"]
    assert [spec.dtype for spec in outputs if spec.name.startswith("next_pending_")] == ["int8", "float16", "float32"]

"""Rounding of keys and values to 8-bit integers: its laws, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medusa_export.common.errors import ModelNotSupportedError
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.integer_caches import restored, rounded
from medusa_export.step.states import observed_states
from support.tiny_models import tiny_model

SHAPE = (2, 3, 4, 4)
VALUES = st.floats(-1e6, 1e6, width=32)


def entries(data: st.DataObject) -> Tensor:
    count = torch.Size(SHAPE).numel()
    return torch.tensor(data.draw(st.lists(VALUES, min_size=count, max_size=count))).reshape(SHAPE)


@given(data=st.data())
def test_a_number_is_half_a_scale_from_the_one_that_stands_for_it(data: st.DataObject) -> None:
    given = entries(data)
    integers, scales = rounded(given)
    assert integers.dtype == torch.int8 and scales.shape == (*SHAPE[:3], 1)
    assert ((restored(integers, scales) - given).abs() <= 0.5001 * scales + 1e-35).all()


@given(data=st.data())
def test_what_is_rounded_stays_as_it_is(data: st.DataObject) -> None:
    integers, scales = rounded(entries(data))
    normal = scales > 1e-30
    again, _ = rounded(restored(integers, scales))
    assert torch.equal(again[normal.expand_as(again)], integers[normal.expand_as(integers)])


@given(data=st.data())
def test_each_entry_and_head_is_rounded_by_itself(data: st.DataObject) -> None:
    given = entries(data)
    integers, scales = rounded(given)
    alone = rounded(given[1:, 2:, 3:])
    normal = scales[1:, 2:, 3:] > 0
    assert torch.equal(alone[1], scales[1:, 2:, 3:])
    assert torch.equal(alone[0][normal.expand_as(alone[0])], integers[1:, 2:, 3:][normal.expand_as(alone[0])])


def test_an_entry_of_zeros_stays_zero() -> None:
    assert not restored(*rounded(torch.zeros(SHAPE))).any()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_an_entry_that_is_not_finite_stays_so(wrong: float) -> None:
    given = torch.ones(SHAPE)
    given[0, 1, 2, 3] = wrong
    numbers = restored(*rounded(given))
    assert not numbers[0, 1, 2, 3].isfinite()
    assert numbers[1].isfinite().all()


def test_a_latent_cache_is_refused() -> None:
    model = tiny_model("deepseek_v2")
    model.set_attn_implementation(ATTENTION_NAME)
    with pytest.raises(ModelNotSupportedError, match="a latent cache together with `kv_cache='int8'`"):
        observed_states(model, 2, "int8")


def test_each_state_is_followed_by_its_scales() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    states = observed_states(model, 2, "int8")
    assert [(state.name, state.kind, state.shape, state.dtype, state.pending) for state in states[:4]] == [
        ("key_0", "kv", (2, 16), "int8", "pending_0"),
        ("key_scale_0", "scale", (2, 1), "float32", "pending_1"),
        ("value_0", "kv", (2, 16), "int8", "pending_0"),
        ("value_scale_0", "scale", (2, 1), "float32", "pending_1"),
    ]

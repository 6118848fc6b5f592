"""Steps that run in PyTorch on a device: fused kernels, and what they may do to be captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medusa_export.step import experts
from medusa_export.step.attention import attention
from medusa_export.step.experts import expert_products, products_of_all
from medusa_export.step.fused import FUSED, fused_attention
from medusa_export.step.replay import ReplayedSteps
from medusa_export.step.sampling import SamplingInputs, draw
from medusa_export.step.step import StepInputs
from medusa_runtime.bundles.contract import constraint_inputs, fixed_shape, sampling_inputs
from support.decoding import TREE, greedy, make_step, random_heads
from support.tiny_models import tiny_model

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]


class OneDevice(TorchDispatchMode):
    """Fails at an operation that has a tensor on the CPU. On a GPU it would copy it there, and wait."""

    def __torch_dispatch__(
        self, operation: Any, _: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), f"{operation} has a tensor on the CPU"
        return result


def zeros_to_draw_with(draws: int) -> SamplingInputs:
    """Inputs of zeros for a row that draws tokens after ``draws`` nodes, under constraints."""
    sizes = {"batch": 1, "draws": draws, "edits": draws, "masks": draws}
    specs = (*sampling_inputs(101), *constraint_inputs(101))
    return SamplingInputs.of(
        [torch.zeros(fixed_shape(spec, sizes), dtype=getattr(torch, spec.dtype)) for spec in specs]
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "cohere2", "qwen2_moe"])
@pytest.mark.parametrize("draws", [0, 9])
def test_a_step_touches_no_other_device_and_reads_no_value(family: str, draws: int) -> None:
    """So CUDA can capture it. The device ``meta`` holds no values: a step that reads one fails on it."""
    model = tiny_model(family)
    step = make_step(model, random_heads(model)).to("meta")
    with torch.device("meta"), torch.no_grad(), OneDevice():
        lengths = torch.zeros(1, dtype=torch.int64)
        sampling = zeros_to_draw_with(draws)
        step(
            StepInputs(
                input_ids=torch.zeros(1, 9, dtype=torch.int64),
                num_tokens=lengths,
                is_prefill=torch.zeros(1, dtype=torch.bool),
                cache_lengths=lengths,
                past=[torch.zeros(1, heads, 64, size) for heads, size in (state.shape for state in step.states)],
                pending=[
                    torch.zeros(1, heads, TREE.max_depth, size)
                    for heads, size in (state.shape for state in step.states)
                ],
                sampling=sampling,
            )
        )


def test_draws_touch_no_other_device() -> None:
    """``draw`` is one operator of a step, whose inside the test of steps doesn't see."""
    with torch.device("meta"), torch.no_grad(), OneDevice():
        whole = torch.zeros(1, 9, dtype=torch.int64)
        ancestors = torch.zeros(1, 9, 9)
        draw(torch.zeros(1, 9, 101), whole, torch.zeros(9, dtype=torch.int64), ancestors, zeros_to_draw_with(9))


@pytest.mark.parametrize("transposed", [True, False])
def test_products_of_experts_read_no_sizes(transposed: bool) -> None:
    """``expert_products`` is one operator, too. Sizes of groups are values of the GPU."""
    torch.manual_seed(0)
    rows, counts = torch.randn(9, 16), torch.tensor([4, 0, 5, 0])
    weights = torch.randn(4, 16, 8)
    matrices = weights if transposed else weights.transpose(1, 2).contiguous()
    expected = expert_products(rows, matrices, counts, transposed)
    torch.testing.assert_close(products_of_all(rows, weights, counts), expected)
    elsewhere = [tensor.to("meta") for tensor in (rows, weights, counts)]
    with torch.no_grad(), OneDevice():
        assert products_of_all(*elsewhere).shape == expected.shape


def test_products_of_experts_on_a_gpu_are_those(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(experts, "products_of_all", lambda *given: asked.append(given))
    expert_products._init_fn(SimpleNamespace(is_cuda=True), torch.zeros(4, 16, 8), torch.zeros(4), True)
    assert len(asked) == 1


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_fused_attention_is_attention(kv_heads: int, biased: bool, softcap: float) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 5, 16), torch.randn(2, kv_heads, 40, 16), torch.randn(2, kv_heads, 40, 8)
    mask = torch.rand(2, 1, 5, 40) < 0.5
    mask[..., 0] = True
    if biased:
        mask = torch.where(mask, torch.randn(2, 6, 5, 40), torch.finfo(torch.float32).min)
    expected = attention(query, key, value, mask, 0.3, softcap)
    torch.testing.assert_close(fused_attention(query, key, value, mask, 0.3, softcap), expected)


@pytest.mark.parametrize("sampling", [True, False])
def test_state_on_the_device_gives_the_tokens_of_transformers(sampling: bool) -> None:
    model = tiny_model("llama")
    expected = greedy(model, PROMPT, 24)
    step = make_step(model, random_heads(model))
    step.sampling, step.kernels = sampling, FUSED
    steps = ReplayedSteps(step, 128)
    for chunk in (5, 512):
        answer, sizes = steps.prefill(PROMPT, chunk=chunk), [9, 4, 1, 9]
        while len(answer) < 24:
            steps.run(sizes[len(answer) % 4])
            answer += steps.read()
        assert answer[:24] == expected
        assert int(steps.lengths[0]) == len(PROMPT) + len(answer) - 1
    # A draft that is right to its end is accepted whole.
    answer = steps.prefill(PROMPT)
    right = dict(zip(((), *TREE.paths), range(TREE.size), strict=True))
    draft = [100] * TREE.size
    for depth in range(TREE.max_depth + 1):
        draft[right[(0,) * depth]] = expected[depth]
    steps.draft(draft)
    steps.run(TREE.size)
    assert steps.read() == expected[1 : TREE.max_depth + 2]

"""Balanced columns: the model computes the same, and the columns of its inputs are of similar sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.progress import ignore_progress
from medusa_export.quantization.layers import LinearInputs, for_each_linear
from medusa_export.quantization.smoothing import smooth
from medusa_export.training.conversations import Sample
from support.tiny_models import tiny_model

TEXTS = [Sample([5, 17, 80, 3, 44, 9], [True] * 6), Sample([7, 2, 61, 33], [True] * 4)]


def peak(inputs: LinearInputs) -> float:
    """The mean square of the largest column, as a multiple of the median one's."""
    squares = inputs.hessian.diagonal()
    return float(squares.max() / squares.median())


def logits(model: PreTrainedModel) -> Tensor:
    return model(torch.tensor([TEXTS[0].input_ids])).logits


def inputs_of(model: PreTrainedModel, *, smoothing: bool) -> dict[str, LinearInputs]:
    found: dict[str, LinearInputs] = {}

    def note(inputs: LinearInputs) -> None:
        found[inputs.name] = inputs

    for_each_linear(model, TEXTS, note, ignore_progress, smoothing=smoothing)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "starcoder2", "gpt_neox", "mixtral", "phi3"])
@torch.inference_mode()
def test_a_model_computes_the_same(family: str) -> None:
    model = tiny_model(family)
    before, inputs = logits(model), inputs_of(model, smoothing=True)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
    # The noted inputs are those of the changed model.
    for name, again in inputs_of(model, smoothing=False).items():
        torch.testing.assert_close(again.hessian, inputs[name].hessian, rtol=1e-2, atol=1e-3)


@torch.inference_mode()
def test_large_columns_become_smaller_and_their_weights_larger() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.input_layernorm.weight[7] = 40.0
        layer.mlp.up_proj.weight[3] *= 40.0
        layer.self_attn.v_proj.weight[5] *= 40.0
    before = inputs_of(model, smoothing=False)
    after = inputs_of(model, smoothing=True)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        for layer in range(2):
            name = f"model.layers.{layer}.{part}"
            assert peak(after[name]) < 0.1 * peak(before[name])


class GeluMlp(nn.Module):
    """Its activation lies between the projections, so its rows can't be divided."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(8, 16)
        self.down_proj = nn.Linear(16, 8)

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = self.down_proj(nn.functional.gelu(self.up_proj(states)))
        return result


@torch.inference_mode()
def test_a_change_that_computes_anything_else_is_undone() -> None:
    torch.manual_seed(0)
    layer, states = GeluMlp(), torch.randn(20, 8)
    before = {name: values.clone() for name, values in layer.state_dict().items()}
    hidden = nn.functional.gelu(layer.up_proj(states)) * torch.linspace(0.1, 10, 16)
    hessians = {"up_proj": states.T @ states, "down_proj": hidden.T @ hidden}
    linears = {"up_proj": layer.up_proj, "down_proj": layer.down_proj}
    assert smooth(linears, [], hessians, lambda: layer(states), head_dim=4) == 0
    assert all(torch.equal(values, before[name]) for name, values in layer.state_dict().items())
    torch.testing.assert_close(hessians["down_proj"], hidden.T @ hidden)

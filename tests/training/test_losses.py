"""Features, the heads' loss, and the teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from medusa_export.common.errors import TrainingError
from medusa_export.heads.modules import MedusaHeads
from medusa_export.training.calibrate import target_places
from medusa_export.training.conversations import Sample
from medusa_export.training.features import Features, _left, hidden_states, positions_of
from medusa_export.training.medusa1 import HeadLoss, _Positions, places
from medusa_export.training.teacher import Teacher
from support.tiny_models import tiny_model


def test_positions() -> None:
    sample = Sample([10, 11, 12, 13, 14, 15, 16], [False, False, True, True, True, False, True])
    positions, targets = positions_of(sample, 3)
    # After 11 the model chooses 12, and the heads' targets are 13 and 14. Then the turn ends.
    assert positions == [1, 2]
    assert targets == [[13, 14, -1], [14, -1, -1]]


def test_soft_targets_are_the_base_models_distribution_at_the_targets_place() -> None:
    """A head that computed the state ahead and projected it like the base model would have the minimal loss."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 16)
    lm_head, embedding = torch.nn.Linear(16, 30, bias=False), torch.nn.Embedding(30, 16)
    left = torch.tensor(_left([0, 1, 2, 3, 7, 8, 9, 10, 11]))
    features = Features(hidden, torch.arange(9), torch.randint(30, (9, 2)), left)
    assert features.left.tolist() == [3, 2, 1, 0, 4, 3, 2, 1, 0]
    ahead = _Positions(features, ahead=True).__getitems__(range(9))["ahead"]
    assert torch.equal(ahead[0], hidden[1:3])
    assert ahead[3].isnan().all()
    assert torch.equal(ahead[2, 0], hidden[3]) and ahead[2, 1].isnan().all()
    loss = HeadLoss(MedusaHeads.fresh(2, lm_head), embedding, 30, teacher=lm_head, soft=1.0).train()
    teacher = torch.softmax(lm_head(hidden[1:3]), -1)
    own = torch.log_softmax(lm_head(hidden[0]), -1)  # an untrained head gives the base model's distribution
    got = loss(hidden[:1], features.next_tokens[:1], features.targets[:1], ahead[:1])["loss"]
    torch.testing.assert_close(got, -(teacher * own).sum(-1) @ torch.tensor([0.8, 0.64]))  # weights of heads 1 and 2


def test_a_batch_reaches_the_projection_as_one_product() -> None:
    """With other strides, torch copies the projection's weight for each row: 14 GB for a batch of 2,048."""
    lm_head = torch.nn.Linear(64, 300, bias=False)
    heads = MedusaHeads.fresh(3, lm_head, conditioned=True, token_map=torch.arange(200))
    seen: list[torch.Tensor] = []
    assert heads.common_projection is not None
    heads.common_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = torch.randn(128, 64)
    assert heads(states, states).shape == (128, 3, 200)
    assert seen[0].is_contiguous()


def test_places() -> None:
    logits = torch.tensor([[[0.1, 0.9, 0.5], [1.0, 2.0, 3.0]]])
    assert places(logits, torch.tensor([[1, 0]]), torch.tensor([[5, 6]])).tolist() == [[0, 2]]
    # A target outside the draft vocabulary counts as a miss. A missing target does not count.
    assert places(logits, torch.tensor([[-1, -1]]), torch.tensor([[5, -1]])).tolist() == [[10, -1]]


@pytest.mark.parametrize("family", ["llama", "cohere", "granite", "gemma2"])
def test_the_teacher_gives_the_models_logits(family: str) -> None:
    model = tiny_model(family)
    ids = torch.tensor([[5, 9, 33, 7]])
    everywhere = torch.ones_like(ids)
    with torch.no_grad():
        hidden, logits = hidden_states(model, ids, everywhere, everywhere.bool())
        torch.testing.assert_close(Teacher(model, None)(hidden[0]), logits[0].float(), rtol=1e-4, atol=1e-6)
        few = torch.tensor([3, 20, 21])
        torch.testing.assert_close(Teacher(model, few)(hidden[0]), logits[0][:, few].float(), rtol=1e-4, atol=1e-6)


def test_teacher_and_ranks_refuse_logits_that_are_not_finite() -> None:
    model = tiny_model("llama")
    heads = MedusaHeads.fresh(2, model.get_output_embeddings())
    torch.nn.init.constant_(heads.layers[0].weight, torch.nan)
    features = Features(torch.ones(3, 64), torch.ones(3), torch.ones(3, 2), torch.zeros(3))
    features = replace(features, next_tokens=features.next_tokens.long(), targets=features.targets.int())
    with pytest.raises(TrainingError, match="heads' logits are not finite"):
        target_places(heads, model.get_input_embeddings(), model.get_output_embeddings(), features)
    model.model.norm.weight[0] = torch.nan
    with pytest.raises(TrainingError, match="gives logits that are not finite"):
        Teacher(model, None)


def test_a_model_that_the_teacher_can_not_reproduce_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: 3 * logits)
    with pytest.raises(TrainingError, match="with `soft=0`"):
        Teacher(model, None)

"""Medusa-2, and training of heads while the base model runs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from medusa_export.cli import main
from medusa_export.heads.files import load_heads
from medusa_export.heads.modules import MedusaHeads
from medusa_export.models.checkpoints import load_model
from medusa_export.training.conversations import Sample
from medusa_export.training.features import _compute
from medusa_export.training.joint import JointLoss, Lora, _Ramp, adapt, collate, perplexity
from medusa_export.training.medusa1 import HEAD_DECAY, HeadLoss
from support.tiny_models import tiny_model
from support.training import history, train

SAMPLES = [
    Sample([5, 6, 7, 8, 9, 10, 11, 12], [False, False, True, True, True, True, True, True]),
    Sample([20, 21, 22, 23, 24], [False, True, True, False, True]),
    Sample([30, 31], [False, False]),  # no tokens of the assistant
]


def batch(num_heads: int = 2) -> dict[str, torch.Tensor]:
    return collate(SAMPLES, num_heads=num_heads, max_length=7)


def fresh(model: Any, **options: Any) -> MedusaHeads:
    heads = MedusaHeads.fresh(2, model.lm_head, **options).float()
    torch.manual_seed(1)
    for parameter in heads.layers.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return heads


def test_a_batch_of_conversations() -> None:
    made = batch()
    assert made["input_ids"].shape == (3, 7)  # cut to max_length
    assert made["attention_mask"].sum(1).tolist() == [7, 5, 2]
    assert [row.nonzero().flatten().tolist() for row in made["predicts"]] == [[1, 2, 3, 4, 5], [0, 1, 3], []]
    assert made["targets"][0].tolist() == [[-1, -1], [8, 9], [9, 10], [10, 11], [11, -1], [-1, -1], [-1, -1]]
    assert made["targets"][1].tolist()[0] == [22, -1]
    assert (made["targets"][2] == -1).all()


@pytest.mark.parametrize("conditioned", [False, True])
def test_online_and_cached_hidden_states_give_one_loss(conditioned: bool) -> None:
    model = tiny_model("llama")
    heads = fresh(model, conditioned=conditioned)
    online = JointLoss(model, heads).eval()(**batch())
    found = _compute(model, [Sample(s.input_ids[:7], s.is_label[:7]) for s in SAMPLES], num_heads=2)
    found = {name: tensor.clone() for name, tensor in found.items()}  # made in inference mode
    cached = HeadLoss(heads, model.get_input_embeddings(), model.lm_head.out_features).eval()
    expected = cached(found["hidden"], found["next_tokens"], found["targets"])
    torch.testing.assert_close(online["loss"], expected["loss"])
    drafts = batch()["targets"][..., 0] >= 0
    assert torch.equal(online["places"][drafts], expected["places"])
    assert (online["places"][~drafts] == -1).all()
    assert "quality" not in online


def test_the_loss_of_medusa2() -> None:
    """The loss is KL(p_original || p) over the assistant's tokens plus λ times the heads' loss."""
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    heads = fresh(model)
    adapted = adapt(model, heads, Lora(rank=4, dropout=0.5))
    module = JointLoss(adapted, heads).eval()
    module.heads_weight = 0.0
    torch.testing.assert_close(module(**batch())["loss"], torch.tensor(0.0))  # LoRA changes nothing at its start
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    made = batch()
    got = module(**made)
    model_input = {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
    with torch.no_grad():
        own = torch.log_softmax(adapted(**model_input).logits[made["predicts"]], -1)
        was = torch.log_softmax(before(**model_input).logits[made["predicts"]], -1)
    divergence = (was.exp() * (was - own)).sum(-1)
    torch.testing.assert_close(got["loss"], divergence.mean(), atol=1e-5, rtol=1e-4)
    said = made["input_ids"].roll(-1, 1)[made["predicts"]]
    nll = torch.nn.functional.nll_loss(own, said, reduction="none")
    torch.testing.assert_close(got["quality"][made["predicts"]][:, 0], nll, atol=1e-5, rtol=1e-4)
    module.heads_weight = 2.0
    alone = module.head_loss  # its inputs are the adapted model's hidden states
    captured: list[torch.Tensor] = []
    hook = adapted.get_output_embeddings().register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    adapted(**model_input)
    hook.remove()
    drafts = made["targets"][..., 0] >= 0
    heads_loss = alone(captured[0][drafts], made["input_ids"].roll(-1, 1)[drafts], made["targets"][drafts])["loss"]
    torch.testing.assert_close(module(**made)["loss"], divergence.mean() + 2 * heads_loss, atol=1e-5, rtol=1e-4)
    assert HEAD_DECAY == 0.8


def test_the_teacher_runs_without_dropout() -> None:
    model = tiny_model("llama")
    heads = fresh(model)
    module = JointLoss(adapt(model, heads, Lora(rank=4, dropout=0.5)), heads).train()
    module.heads_weight = 0.0
    assert module(**batch())["loss"] == 0  # LoRA changes nothing at its start, with any dropout
    assert module.model.training


@pytest.mark.parametrize(("shared", "expected"), [(True, False), (False, True)])
def test_lora_leaves_out_an_lm_head_that_heads_use(shared: bool, expected: bool) -> None:
    model = tiny_model("llama")
    heads = MedusaHeads.fresh(2, model.lm_head, own_projections=not shared)
    names = [name for name, _ in adapt(model, heads, Lora()).named_parameters() if "lora_A" in name]
    assert any("lm_head" in name for name in names) == expected
    assert sum("layers.0." in name for name in names) == 7


@pytest.mark.parametrize(("family", "dense"), [("qwen3_moe", "layers.1.mlp."), ("glm4_moe", "mlp.shared_experts.")])
def test_lora_adapts_linear_layers_beside_experts(family: str, dense: str) -> None:
    model = tiny_model(family)
    adapted = adapt(model, fresh(model), Lora())
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert sum(dense in name for name in names) % 3 == 0 < sum(dense in name for name in names)  # gate, up, down
    assert not any("experts.lora" in name for name in names)


def test_a_checkpoint_holds_what_is_trained() -> None:
    model = tiny_model("llama")
    heads = fresh(model)
    module = JointLoss(adapt(model, heads, Lora()), heads)
    state = module.state_dict()
    assert set(state) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in state) and any("head_loss.heads.layers" in name for name in state)


def test_the_ramp() -> None:
    model = tiny_model("llama")
    module = JointLoss(model, fresh(model))
    whole = module.train()(**batch())["loss"]
    ramp = _Ramp(module)
    for step, share in ((0, math.sin(math.pi / 20)), (4, math.sin(math.pi / 4)), (9, 1)):
        ramp.on_step_begin(None, type("State", (), {"global_step": step, "max_steps": 10})(), None)
        torch.testing.assert_close(module(**batch())["loss"], share * whole)
        torch.testing.assert_close(module.eval()(**batch())["loss"], whole)  # held-out losses don't use the ramp
        module.train()


def test_heads_see_the_base_model_without_its_dropout() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5)
    module = JointLoss(model, fresh(model)).train()
    assert module.head_loss.training
    assert module(**batch())["loss"] == module(**batch())["loss"]


def test_perplexity() -> None:
    """The loss equals the mean over all assistant tokens, computed sample by sample."""
    model = tiny_model("llama")
    expected = []
    for sample in SAMPLES:
        logits = torch.log_softmax(model(torch.tensor([sample.input_ids])).logits[0], -1)
        places = [i for i in range(1, len(sample.input_ids)) if sample.is_label[i]]
        expected += [-float(logits[i - 1, sample.input_ids[i]]) for i in places]
    assert perplexity(model, [SAMPLES[:2], SAMPLES[2:]]) == pytest.approx(math.exp(sum(expected) / len(expected)))


@pytest.mark.slow
def test_medusa2(tiny_model_folder: Path, talks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = train(tiny_model_folder, talks, out, "--recipe", "medusa2", "--joint-epochs", 3)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "The model still chooses the same token at" in result.output
    joint = history(out, "joint")
    # The second stage begins with the heads of the first stage and the original base model.
    assert joint[0]["eval_head1_top1"] == history(out, "training")[-1]["eval_head1_top1"]
    assert joint[0]["eval_kl"] == 0
    assert joint[0]["eval_perplexity"] == joint[0]["eval_perplexity_before"] == joint[-1]["eval_perplexity_before"]
    assert joint[-1]["eval_head1_top1"] > joint[0]["eval_head1_top1"]
    assert 0 < joint[-1]["eval_kl"] < 0.1
    changed, was = load_model(str(out / "model"), dtype=torch.float32), tiny_model("llama")
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(changed.get_parameter(weight), was.get_parameter(weight))
    assert torch.equal(changed.get_parameter("lm_head.weight"), was.get_parameter("lm_head.weight"))
    assert json.loads((out / "config.json").read_text())["base_model_name_or_path"] == str(out / "model")
    # The merged model is the trained model.
    log = json.loads((out / "training.json").read_text())
    assert log["joint"][-1]["merged_perplexity"] == pytest.approx(joint[-1]["eval_perplexity"], rel=1e-4)
    assert load_heads(out, changed).config.num_heads == 2
    # Training from heads has no first stage. The same command continues at the end, so it changes nothing.
    again = train(tiny_model_folder, talks, tmp_path / "again", "--recipe", "medusa2", "--heads", out)
    result = CliRunner().invoke(main, again)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "training" not in json.loads((tmp_path / "again" / "training.json").read_text())
    before = (out / "model" / "model.safetensors").read_bytes()
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert (out / "model" / "model.safetensors").read_bytes() == before
    assert history(out, "joint") == joint


def test_hidden_states_computed_in_each_epoch(tiny_model_folder: Path, talks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(main, train(tiny_model_folder, talks, out, "--hidden-states", "online"))
    assert result.exit_code == 0, (result.output, result.exception)
    assert not (out / "features").exists()
    figures = history(out, "training")
    assert figures[-1]["eval_loss"] < figures[0]["eval_loss"]


def test_several_data_sets_share_no_held_out_prompt(tiny_model_folder: Path, talks: Path, tmp_path: Path) -> None:
    from medusa_export.training.dataset import load_sources

    half = tmp_path / "half.jsonl"
    half.write_text("".join(talks.read_text().splitlines(keepends=True)[::2]))
    splits = load_sources([talks, half], heldout=0.2).splits
    held_out = {c.prompt_key for split in splits["heldout"] for c in split.conversations}
    assert held_out and not held_out & {c.prompt_key for split in splits["train"] for c in split.conversations}
    arguments = train(tiny_model_folder, talks, tmp_path / "out", "--data", half)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(list((tmp_path / "out" / "features").iterdir())) == 4

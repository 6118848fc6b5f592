"""Medusa-2, and training of heads while the base model runs."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from medusa_export.cli import main
from medusa_export.heads.files import load_heads
from medusa_export.heads.modules import MedusaHeads
from medusa_export.models.checkpoints import load_model
from medusa_export.training.conversations import Sample
from medusa_export.training.features import _compute
from medusa_export.training.job import SETTINGS
from medusa_export.training.joint import JointLoss, Lora, _Ramp, adapt, collate, perplexity
from medusa_export.training.medusa1 import HEAD_DECAY, HeadLoss
from medusa_export.training.run import _last_complete
from support.tiny_models import tiny_model

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
    """It is KL(p_original || p) over the assistant's tokens plus λ times the heads' loss."""
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
    """It equals the mean over all assistant tokens, computed sample by sample."""
    model = tiny_model("llama")
    expected = []
    for sample in SAMPLES:
        logits = torch.log_softmax(model(torch.tensor([sample.input_ids])).logits[0], -1)
        places = [i for i in range(1, len(sample.input_ids)) if sample.is_label[i]]
        expected += [-float(logits[i - 1, sample.input_ids[i]]) for i in places]
    assert perplexity(model, [SAMPLES[:2], SAMPLES[2:]]) == pytest.approx(math.exp(sum(expected) / len(expected)))


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    with path.open("w") as file:
        for i in range(40):
            answer = f"The answer is {i % 7}, and that is all there is to say."
            messages = [{"role": "user", "content": f"Prompt {i}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


OPTIONS = ("--epochs", 2, "--batch-size", 32, "--conversations", 4, "--heldout", 0.2, "-q")


def train(model: Path, talks: Path, out: Path, *options: object) -> list[str]:
    shape = () if "--heads" in options else ("--num-heads", 2)
    return [str(a) for a in ("train", model, "--data", talks, "-o", out, *OPTIONS, *shape, *options)]


def history(out: Path, name: str) -> list[dict[str, float]]:
    return [entry for entry in json.loads((out / "training.json").read_text())[name] if "eval_loss" in entry]


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


@pytest.mark.parametrize("begun", [pytest.param("online", marks=pytest.mark.slow), "cached"])
def test_a_training_continues_in_the_way_that_it_began(
    tiny_model_folder: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    out = tmp_path / "out"
    arguments = train(tiny_model_folder, talks, out)
    assert CliRunner().invoke(main, [*arguments, "--hidden-states", begun]).exit_code == 0
    before = (out / "medusa_lm_head.safetensors").read_bytes()
    room = 0 if begun == "cached" else 1 << 50
    monkeypatch.setattr("medusa_export.training.job.size_of", lambda *_: (1 << 49) - room)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert (out / "features").is_dir() == (begun == "cached")
    assert (out / "medusa_lm_head.safetensors").read_bytes() == before


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


def run_and_kill(arguments: list[str], ready: Any) -> None:
    """Starts a command, and kills it with SIGKILL as soon as ``ready`` returns True."""
    process = subprocess.Popen([sys.executable, "-m", "medusa_export", *arguments], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_distillation_continues(tiny_model_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Prompt number {i}" for i in range(60)))

    def arguments(out: Path) -> list[str]:
        options = ("--prompts", prompts, "--batch-size", 4, "-n", 24, "--temperature", 1, "-q")
        return [str(a) for a in ("distill", tiny_model_folder, "-o", out, *options)]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert CliRunner().invoke(main, arguments(whole)).exit_code == 0
    run_and_kill(arguments(broken), lambda: len(list((broken / "answers").glob("0*.jsonl"))) >= 5)
    assert not (broken / "train.jsonl").exists()
    assert CliRunner().invoke(main, arguments(broken)).exit_code == 0
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.long
@pytest.mark.slow
def test_a_killed_training_continues(tiny_model_folder: Path, talks: Path, tmp_path: Path) -> None:
    options = ("--recipe", "medusa2", "--joint-epochs", 3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert CliRunner().invoke(main, train(tiny_model_folder, talks, whole, *options)).exit_code == 0
    arguments = train(tiny_model_folder, talks, broken, *options)
    for stage in ("checkpoints", "joint_checkpoints"):
        run_and_kill(arguments, lambda: any((broken / stage).glob("checkpoint-*/trainer_state.json")))  # noqa: B023
        assert not (broken / "medusa_lm_head.safetensors").exists()
    assert CliRunner().invoke(main, arguments).exit_code == 0
    for name in ("medusa_lm_head.safetensors", "model/model.safetensors"):
        expected = load_file(whole / name)
        for key, tensor in load_file(broken / name).items():
            torch.testing.assert_close(tensor, expected[key], msg=key)
    for stage in ("training", "joint"):
        for found, expected in zip(history(broken, stage), history(whole, stage), strict=True):
            assert (found["epoch"], found["eval_loss"]) == pytest.approx((expected["epoch"], expected["eval_loss"]))


@pytest.fixture(scope="module")
def whole(tiny_model_folder: Path, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training by both stages of Medusa-2 that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert CliRunner().invoke(main, train(tiny_model_folder, talks, out, "--recipe", "medusa2")).exit_code == 0
    return out


@pytest.mark.slow
def test_a_training_killed_between_its_stages_continues(
    tiny_model_folder: Path, talks: Path, whole: Path, tmp_path: Path
) -> None:
    """LoRA's initial weights don't depend on random numbers that the process drew before."""
    broken = tmp_path / "broken"
    shutil.copytree(whole / "checkpoints", broken / "checkpoints")
    shutil.copy(whole / SETTINGS, broken)
    assert CliRunner().invoke(main, train(tiny_model_folder, talks, broken, "--recipe", "medusa2")).exit_code == 0
    for name in ("medusa_lm_head.safetensors", "model/model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_an_incomplete_checkpoint_is_skipped(tmp_path: Path) -> None:
    for steps, text in ((9, "{}"), (10, '{"epoch": 1}'), (11, '{"epo'), (12, None)):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
        for part in ("optimizer.pt", "scheduler.pt"):
            (folder / part).touch()
    (tmp_path / "checkpoint-13").mkdir()
    (tmp_path / "checkpoint-13" / "trainer_state.json").write_text("{}")  # without the optimizer
    assert _last_complete(tmp_path) == str(tmp_path / "checkpoint-10")
    assert _last_complete(tmp_path / "none") is None


@pytest.mark.slow
def test_the_main_process_goes_first(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys, time
from pathlib import Path
from medusa_export.training.processes import Processes

processes, flag = Processes(None), Path(sys.argv[1])
with processes.main_first():
    assert processes.is_main or flag.is_file()
    if processes.is_main:
        time.sleep(1)
        flag.touch(exist_ok=False)
"""
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run([*launcher, script, tmp_path / "flag"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flag").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_train_together(tiny_model_folder: Path, talks: Path, whole: Path, tmp_path: Path) -> None:
    # accelerate starts several processes only for GPUs. So GPUs are requested, and then not used.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher = [*launch, "-m", "medusa_export"]
    arguments = train(tiny_model_folder, talks, tmp_path / "out", "--recipe", "medusa2")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Accuracy on held-out prompts") == 1
    figures = history(tmp_path / "out", "training")
    assert figures[-1]["eval_loss"] < figures[0]["eval_loss"]
    # Held-out figures before the first step don't depend on the number of processes.
    first, other = history(whole, "training")[0], figures[0]
    assert other["eval_head1_top10"] == pytest.approx(first["eval_head1_top10"])

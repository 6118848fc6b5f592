"""Trainings and distillations that were interrupted continue, and several processes train together."""

from __future__ import annotations

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
from medusa_export.training.job import SETTINGS
from medusa_export.training.processes import Processes
from medusa_export.training.run import _last_complete
from support.forks import run_command, started
from support.servers import free_port
from support.training import history, train


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


def run_and_kill(arguments: list[str], ready: Any) -> None:
    """Starts a command, and kills it with SIGKILL as soon as ``ready`` returns True."""
    process = started(run_command, arguments)
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.is_alive(), process.exitcode
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


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


def make_flag(flag: Path) -> None:
    """The main process makes a file, which takes a second. The others find it."""
    processes = Processes(None)
    with processes.main_first():
        assert processes.is_main or flag.is_file()
        if processes.is_main:
            time.sleep(1)
            flag.touch(exist_ok=False)


@pytest.mark.slow
def test_the_main_process_goes_first(tmp_path: Path) -> None:
    """With the variables of ``torchrun``; the test below starts processes by ``accelerate launch``."""
    of_all = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        started(make_flag, tmp_path / "flag", environment=of_all | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
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

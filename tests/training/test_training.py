"""Training by Medusa-1: it learns, continues after interruptions, and refuses what it can't do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import TrainingArguments

from medusa_export.cli import main
from medusa_export.heads.files import load_heads
from medusa_export.heads.modules import MedusaHeads
from medusa_export.heads.writer import save_heads
from medusa_export.training.job import SETTINGS
from medusa_export.training.run import Schedule, run_training
from medusa_export.trees.calibration import Calibration
from medusa_runtime import Bundle, MedusaEngine
from medusa_runtime.tuning import DEEPEST_LOOKUP
from support.full_disk import no_file_larger_than
from support.tiny_models import tiny_model


@pytest.mark.parametrize(
    "options",
    [
        ("--conditioned", "--num-layers", 2, "--draft-vocab", 40, "--soft", 0.5),
        pytest.param(("--plain",), marks=pytest.mark.slow),
        pytest.param(("--plain", "--own-projections", "--draft-vocab", 60), marks=pytest.mark.slow),
    ],
)
def test_trained_heads_learn_and_decode_losslessly(
    data: Path, tiny_model_folder: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    out = tmp_path / "heads"
    arguments = [
        "train", tiny_model_folder, "--data", data, "-o", out, "--num-heads", 2, "--epochs", 12, "--batch-size", 16,
        "-q", *options,
    ]  # fmt: skip
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    losses = [entry["loss"] for entry in json.loads((out / "training.json").read_text())["training"] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (out / "training.png").stat().st_size > 1000
    model = tiny_model("llama")
    heads = load_heads(out, model)
    assert heads.config.conditioned == ("--conditioned" in options)
    bundle = tmp_path / "bundle"
    arguments = ["onnx", tiny_model_folder, "--heads", out, "--top-k", 4, "--greedy-only", "-o", bundle, "-q"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    with MedusaEngine.load(bundle) as engine:
        tokens = [
            engine.generate("A prompt", max_new_tokens=32, tree_size=size).token_ids
            for size in (1, 3, engine.bundle.tree.size)
        ]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.slow
def test_training_continues_from_its_checkpoint(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    arguments = ["train", tiny_model_folder, "--data", data, "--num-heads", 2, "--batch-size", 16, "-q"]

    def train(folder: Path, epochs: int) -> dict[str, torch.Tensor]:
        command = [str(a) for a in (*arguments, "-o", folder, "--epochs", epochs)]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, (result.output, result.exception)
        return dict(load_heads(folder, tiny_model("llama")).state_dict())

    whole = train(tmp_path / "whole", 2)
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert len(checkpoints) == 2
    # The state after a kill in the second epoch.
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / SETTINGS, tmp_path / "again")
    checkpoints[0].rename(tmp_path / "again" / "checkpoints" / checkpoints[0].name)
    again = train(tmp_path / "again", 2)
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, msg=name)


@pytest.mark.slow
def test_a_training_continues_only_with_its_own_settings(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """Otherwise it would use another training's checkpoints as its own."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((data / "train.jsonl").read_text() + (data / "heldout.jsonl").read_text())
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text(rows.read_text().split("\n", 3)[3])
    out = tmp_path / "out"

    def train(*options: object) -> Result:
        command = ["train", tiny_model_folder, "-o", out, "--batch-size", 16, *options]
        return CliRunner().invoke(main, [*map(str, command), "--epochs", "2", "-q"])

    sources = ("--data", rows, "--heldout", 0.3)
    first = (*sources, "--num-heads", 2)
    assert train(*first).exit_code == 0
    assert train(*first, "--save-dtype", "fp32").exit_code == 0
    for options, words in [
        ((*first, "--learning-rate", 0.5), "learning_rate = 0.002, not 0.5"),
        ((*first, "--draft-vocab", 30), "draft_vocab = None, not 30"),
        ((*sources, "--heads", out), "heads = "),
        ((*first, "--heldout", 0.4), "heldout = 0.3, not 0.4"),
        (("--data", fewer, *first[2:]), "data = "),
    ]:
        result = train(*options)
        assert result.exit_code == 1
        assert f"was begun with {words}" in result.output
    (out / SETTINGS).unlink()
    result = train(*first)
    assert result.exit_code == 1
    assert "holds checkpoints but no settings.json" in result.output
    for checkpoint in (out / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)  # as if the training had failed before its first one
    result = train(*first, "--learning-rate", 0.01)
    assert result.exit_code == 0, result.output


def test_another_chat_template_counts_as_other_data(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model_folder, model)
    command = ["train", model, "--data", data, "-o", out, "--num-heads", 2, "--epochs", 1, "-q"]
    assert CliRunner().invoke(main, [*map(str, command)]).exit_code == 0
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("{%", "!{%", 1))
    result = CliRunner().invoke(main, [*map(str, command)])
    assert result.exit_code == 1
    assert "was begun with data = " in result.output


def test_options_of_new_heads_are_refused_with_given_heads(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    command = ["train", tiny_model_folder, "--data", data, "-o", tmp_path, "--heads", tmp_path, "--plain"]
    result = CliRunner().invoke(main, [*map(str, command)])
    assert result.exit_code == 2
    assert "leave --conditioned and --plain out" in result.output


def test_heads_are_not_written_into_a_models_folder(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """The folder is refused before the training starts."""
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    command = ["train", tmp_path / "model", "--data", data, "-o", tmp_path / "model", "-q"]
    result = CliRunner().invoke(main, [*map(str, command)])
    assert result.exit_code == 1
    assert "is the configuration of a llama model" in result.output
    assert not (tmp_path / "model" / "features").exists()


def test_a_loss_that_is_nan_is_an_error(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["train", tiny_model_folder, "--data", data, "-o", out, "--num-heads", 2, "--learning-rate", 1e38, "-q"]
    result = CliRunner().invoke(main, [*map(str, command), "--batch-size", "16", "--epochs", "4"])
    assert result.exit_code == 1
    assert "is NaN or infinite" in result.output
    assert not (out / "medusa_lm_head.safetensors").exists()


class Scale(torch.nn.Module):
    """The smallest module that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (self.weight * targets - 1).square().mean()
        return {"loss": loss} if self.training else {"loss": loss, "places": targets}


def test_one_process_trains_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it sees several. By default transformers would give each of them a batch."""

    def with_two(**options: Any) -> TrainingArguments:
        arguments = TrainingArguments(**options)
        arguments._n_gpu = 2
        return arguments

    monkeypatch.setattr("medusa_export.training.run.TrainingArguments", with_two)
    assert scaled(Scale(), tmp_path, epochs=1)[-1]["step"] == 4


def scaled(module: Scale, checkpoints: Path, *, epochs: float) -> list[dict[str, Any]]:
    """Runs a training with four steps per epoch."""
    return run_training(
        module,
        [torch.tensor([0.5])] * 16,
        [torch.tensor([0.5])] * 4,
        Schedule(epochs=epochs, learning_rate=0.1, batch_size=4),
        checkpoints,
        collate=lambda batch: {"targets": torch.stack(batch)},
        metrics=lambda *_: {},
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("epochs", [0.5, 1, 2])
def test_a_finished_training_changes_nothing(tmp_path: Path, epochs: float) -> None:
    first, again = Scale(), Scale()
    history = scaled(first, tmp_path, epochs=epochs)
    assert [entry["epoch"] for entry in history if "eval_loss" in entry] == [0, *range(1, int(epochs)), epochs]
    assert first.weight != 1
    assert scaled(again, tmp_path, epochs=epochs) == [entry for entry in history if "train_runtime" not in entry]
    assert again.weight == first.weight


@pytest.mark.slow
def test_soft_targets_need_hidden_states_that_are_kept(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    command = ["train", tiny_model_folder, "--data", data, "-o", tmp_path / "out", "--soft", 0.5, "-q"]
    result = CliRunner().invoke(main, [*map(str, command), "--hidden-states", "online"])
    assert result.exit_code == 1
    assert "--soft" in result.output
    # Then the remedy in the message works in the same folder, as no file depends on the options yet.
    result = CliRunner().invoke(main, [*map(str, command), "--epochs", "1", "--hidden-states", "cached"])
    assert result.exit_code == 0, result.output


def test_a_draft_vocabulary_that_is_too_large_is_refused(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    command = ["train", tiny_model_folder, "--data", data, "-o", tmp_path / "out", "--draft-vocab", 10**6, "-q"]
    result = CliRunner().invoke(main, [*map(str, command)])
    assert result.exit_code == 1
    assert "can't propose 1,000,000 tokens" in result.output


# The limits are chosen so that the file in the message is the first to reach them.
@pytest.mark.parametrize(
    ("limit", "words", "options"),
    [
        (20_000, "000000.safetensors can't be written", ()),
        # The checkpoint's weights, which safetensors writes.
        pytest.param(60_000, "A checkpoint can't be written", (), marks=pytest.mark.slow),
        # The optimizer, which torch writes.
        pytest.param(90_000, "A checkpoint can't be written", ("--hidden-states", "online"), marks=pytest.mark.slow),
        pytest.param(
            180_000, "The model can't be written", ("--recipe", "medusa2", "--lora-rank", 1), marks=pytest.mark.slow
        ),
    ],
)
def test_a_training_continues_after_a_full_disk(
    data: Path, tiny_model_folder: Path, tmp_path: Path, limit: int, words: str, options: tuple[object, ...]
) -> None:
    def train(folder: Path) -> Result:
        command = ["train", tiny_model_folder, "--data", data, "-o", folder, "--num-heads", 2, "--epochs", 2, *options]
        return CliRunner().invoke(main, [*map(str, command), "-q"])

    with no_file_larger_than(limit):
        result = train(tmp_path / "full")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list((tmp_path / "full").rglob("*.partial*"))
    assert all((checkpoint / "trainer_state.json").is_file() for checkpoint in tmp_path.rglob("checkpoint-*"))
    for folder in ("full", "whole"):
        result = train(tmp_path / folder)
        assert result.exit_code == 0, (result.output, result.exception)
    expected = load_file(tmp_path / "whole" / "medusa_lm_head.safetensors")
    for name, tensor in load_file(tmp_path / "full" / "medusa_lm_head.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def flip_a_byte(path: Path) -> None:
    """Changes a byte in the last quarter of a file, where a file of tensors holds values."""
    content = bytearray(path.read_bytes())
    content[-len(content) // 4] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_byte, cut])
def test_damaged_files_of_a_training_are_found(
    data: Path, tiny_model_folder: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    command = ["train", tiny_model_folder, "--data", data, "-o", out, "--num-heads", 2, "--epochs", 2, "-q"]

    def train() -> Result:
        return CliRunner().invoke(main, list(map(str, command)))

    assert train().exit_code == 0
    shard = next((out / "features").glob("train-*/000000.safetensors"))
    damage(shard)
    result = train()
    assert result.exit_code == 1
    assert f"{shard} is damaged" in result.output
    if damage is flip_a_byte:  # checkpoints are damaged below in one case of the two
        return
    shard.unlink()
    assert train().exit_code == 0
    last = max((out / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    cut(last / "model.safetensors")
    result = train()
    assert result.exit_code == 1
    assert f"{last} is damaged" in result.output
    shutil.rmtree(last)
    (before,) = (out / "checkpoints").iterdir()
    for name, content in (("optimizer.pt", None), ("optimizer.pt", b""), ("rng_state.pth", b"")):
        whole = (before / name).read_bytes()
        (before / name).write_bytes(whole[:-100] if content is None else content)
        result = train()
        assert result.exit_code == 1
        assert f"{before} is damaged" in result.output
        (before / name).write_bytes(whole)
    assert train().exit_code == 0


@pytest.mark.slow
def test_from_heads_to_a_calibrated_bundle(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    heads = MedusaHeads.fresh(2, tiny_model("llama").lm_head)
    save_heads(heads, tmp_path / "heads", base_model_name_or_path="base")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    common = ("calibrate", tiny_model_folder, "--heads", tmp_path / "heads", "-q")
    run(*common, "--data", data, "-o", tmp_path / "once.json", "--plot", tmp_path / "c.png")
    run(*common, "--data", data, "--data", data, "-o", tmp_path / "twice.json")
    run(*common, "--data", data, "--no-lookup", "-o", tmp_path / "alone.json")
    run(*common, "--data", data, "--no-lookup", "--dtype", "bf16", "--device", "cpu", "-o", tmp_path / "bf16.json")
    rounded = Calibration.load(tmp_path / "bf16.json").accuracies
    once, twice, alone = (Calibration.load(tmp_path / f"{name}.json") for name in ("once", "twice", "alone"))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "to and fro, " * 9}]
    (tmp_path / "again.jsonl").write_text(json.dumps({"messages": turns}))
    run(*common, "--data", tmp_path / "again.jsonl", "-o", tmp_path / "again.json")
    again = Calibration.load(tmp_path / "again.json")
    assert 0 < again.hit_share < 1 and not alone.hit_paths
    assert again.hit_paths[(0,) * DEEPEST_LOOKUP] > 0.5 > again.hit_paths.get((1,), 0)
    assert alone.accuracies == once.accuracies
    assert np.abs(np.array(rounded) - np.array(once.accuracies)).max() < 0.05
    assert twice.positions == 2 * once.positions
    assert twice.accuracies == once.accuracies
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert "tokens" in run("tree", tmp_path / "once.json", "--size", 6, "-o", tmp_path / "tree.json", "-q")
    run("onnx", tiny_model_folder, "--heads", tmp_path / "heads", "--calibration", tmp_path / "once.json",
        "--tree", tmp_path / "tree.json", "--greedy-only", "-o", tmp_path / "bundle", "-q")  # fmt: skip
    acceptance = Bundle.load(tmp_path / "bundle").acceptance
    assert acceptance.source == "calibrated"
    assert acceptance.node_values[0] == 1 and len(acceptance.node_values) == 6
    save_heads(MedusaHeads.fresh(3, tiny_model("llama").lm_head), tmp_path / "three", base_model_name_or_path="base")
    arguments = ["onnx", tiny_model_folder, "--heads", tmp_path / "three", "--calibration", tmp_path / "once.json"]
    result = CliRunner().invoke(main, [*map(str, arguments), "-o", str(tmp_path / "other"), "-q"])
    assert result.exit_code == 2
    assert "is of 2 heads, but these are 3" in result.output
    # No other path was ever right, so the tree is smaller than requested, and the command reports that.
    result = CliRunner().invoke(main, ["tree", str(tmp_path / "once.json"), "--size", "100000", "-q"])
    assert "nodes, not 100000" in result.output

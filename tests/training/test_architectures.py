"""New heads of an architecture that another package registers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import medusa_export
from medusa_export import HeadShape, OptionError, TrainOptions
from medusa_export.cli import main
from medusa_export.common.errors import ExtensionError
from medusa_export.heads.architecture import HeadArchitecture, head_architecture
from medusa_export.heads.files import load_heads
from medusa_export.heads.modules import MedusaHeads
from medusa_export.training.job import SETTINGS
from support.extensions.bottleneck_heads import ARCHITECTURE, BottleneckConfig, BottleneckHeads
from support.tiny_models import tiny_model


def test_the_registrys_architecture_makes_fresh_heads() -> None:
    lm_head = tiny_model("llama", num_hidden_layers=1).lm_head
    heads = head_architecture("bottleneck").fresh(2, lm_head)
    assert isinstance(heads, BottleneckHeads)
    assert heads.config == BottleneckConfig(2, 64, 101)
    state = torch.random.get_rng_state()
    again, other = ARCHITECTURE.fresh(2, lm_head), ARCHITECTURE.fresh(2, lm_head, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(heads.down, again.down) and not torch.equal(heads.down, other.down)
    assert isinstance(head_architecture("medusa").fresh(2, lm_head), MedusaHeads)
    narrow = torch.nn.Linear(4, 101)
    with pytest.raises(OptionError, match="architecture 'bottleneck': rank is 8: expected 1 to 4"):
        ARCHITECTURE.fresh(2, narrow)
    assert HeadArchitecture(BottleneckConfig, BottleneckHeads).fresh(1, lm_head).config.num_heads == 1


def test_they_are_trained_and_continue(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads"

    def train(*options: object) -> tuple[int, str]:
        command = ["train", tiny_model_folder, "--data", data, "-o", out, "--batch-size", 16, "--epochs", 4, "-q"]
        result = CliRunner().invoke(main, [*map(str, command), *map(str, options)])
        return result.exit_code, result.output

    bottleneck = ("--head-architecture", "bottleneck", "--num-heads", 2)
    code, output = train(*bottleneck)
    assert code == 0, output
    losses = [entry["loss"] for entry in json.loads((out / "training.json").read_text())["training"] if "loss" in entry]
    assert losses[-1] < losses[0]
    heads = load_heads(out, tiny_model("llama"))
    assert isinstance(heads, BottleneckHeads) and heads.config.num_heads == 2
    assert heads.up.abs().max() > 0
    assert train(*bottleneck)[0] == 0  # it is finished: the same heads again
    code, output = train("--num-heads", 2)
    assert code == 1 and "was begun with " in output


def test_options_of_medusa_heads_are_refused(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    for shape, options in (
        (HeadShape(num_layers=2, architecture="bottleneck"), TrainOptions()),
        (HeadShape(draft_vocab=20, architecture="bottleneck"), TrainOptions()),
        (HeadShape(architecture="bottleneck"), TrainOptions(own_projections=True)),
    ):
        with pytest.raises(OptionError, match="'bottleneck' have a shape of their own: give `num_heads` alone"):
            medusa_export.train(tiny_model_folder, [data], tmp_path / "out", shape=shape, options=options)
    with pytest.raises(ExtensionError, match="There is no head architecture named 'bottle'; there are: "):
        medusa_export.train(tiny_model_folder, [data], tmp_path / "out", shape=HeadShape(architecture="bottle"))
    command = ["train", tiny_model_folder, "--data", data, "-o", tmp_path / "out", "--heads", tmp_path]
    result = CliRunner().invoke(main, [*map(str, command), "--head-architecture", "bottleneck"])
    assert result.exit_code == 2 and "leave --head-architecture out" in result.output


def test_settings_of_earlier_versions_are_those_of_medusa_heads(
    data: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """They have no architecture, and their trainings continue."""
    options = TrainOptions(epochs=1, batch_size=16)
    medusa_export.train(tiny_model_folder, [data], tmp_path, shape=HeadShape(num_heads=2), options=options)
    settings = json.loads((tmp_path / SETTINGS).read_text())["settings"]
    assert "architecture" not in settings and settings["num_heads"] == 2

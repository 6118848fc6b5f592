"""A head architecture that lives outside the package: one file, one registration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from medusa_export.common.errors import CheckpointError
from medusa_export.heads.files import ARCHITECTURE_KEY, CONFIG_KEY, HEADS_FILE, load_heads
from medusa_export.heads.writer import save_heads
from medusa_export.training.features import Features
from medusa_export.training.medusa1 import train_medusa1
from medusa_export.training.run import Schedule
from medusa_runtime import Bundle, Tree
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from support.decoding import TREE, decode, export, greedy, make_step
from support.extensions.bottleneck_heads import BottleneckConfig, BottleneckHeads
from support.stock import Stock
from support.tiny_models import tiny_model

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]
CONFIG = BottleneckConfig(num_heads=3, hidden_size=64, draft_vocab_size=101, rank=5)


def features(model: PreTrainedModel, length: int = 200) -> Features:
    """The hidden states of one long greedy answer, and the tokens that the heads have to propose."""
    tokens = torch.tensor([[*PROMPT, *greedy(model, PROMPT, length)]])
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[0]
    rows = torch.arange(len(PROMPT), length)
    ahead = tokens[0][rows.unsqueeze(1) + torch.arange(2, 2 + CONFIG.num_heads)]
    return Features(hidden[rows], tokens[0, rows + 1], ahead.int(), (length - rows).int())


def trained(model: PreTrainedModel, checkpoints: Path) -> BottleneckHeads:
    """Heads after a few steps of the trainer that MEDUSA heads have."""
    torch.manual_seed(0)
    heads = BottleneckHeads(CONFIG, model.lm_head)
    heads.set_trainable(projections=False)
    data = features(model)
    schedule = Schedule(epochs=20, learning_rate=0.02, batch_size=32)
    history = train_medusa1(
        heads, model, data, data, schedule, checkpoints, teacher=None, soft=0.0, device=torch.device("cpu")
    )
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    return heads


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained heads on disk."""
    folder = tmp_path_factory.mktemp("bottleneck")
    save_heads(trained(model, folder / "checkpoints"), folder, base_model_name_or_path="base", lm_head=model.lm_head)
    return folder


def test_heads_are_read_as_they_were_written(folder: Path, model: PreTrainedModel) -> None:
    heads = load_heads(folder, model)
    assert isinstance(heads, BottleneckHeads)
    assert heads.config == CONFIG
    assert heads.variant == "bottleneck"
    assert heads.up.abs().max() > 0
    written = load_file(folder / HEADS_FILE)
    assert written.keys() == {"down", "up"}
    torch.testing.assert_close(heads.up.data, written["up"])
    described = json.loads((folder / "config.json").read_text())
    assert described["architecture"] == "bottleneck"
    assert described["rank"] == 5


def test_exported_heads_decode_losslessly(folder: Path, model: PreTrainedModel, stock: Stock) -> None:
    base = tiny_model("llama", num_hidden_layers=1)
    expected = [greedy(model, PROMPT, 40)]
    step = make_step(base, load_heads(folder, base))
    step.sampling = False
    bundle = Bundle.load(stock.folder("bottleneck", lambda out: export(step, out)))
    assert bundle.heads is not None and bundle.heads.variant == "bottleneck"
    for graph in (bundle.graph, None):
        backend = OnnxRuntimeBackend(bundle, threads=1, graph=graph)
        for size in (1, 2, TREE.size):
            result = decode(backend, TREE, [PROMPT], expected, size=size, chunk=64, count=40, seed=None)
            assert result.tokens == expected
        assert max(result.accepted) > 1, "no draft of the heads was accepted: that shows nothing"


def test_a_shallower_tree_keeps_the_first_heads(folder: Path, model: PreTrainedModel) -> None:
    heads = load_heads(folder, model)
    hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    kept = heads.truncated(2)
    torch.testing.assert_close(kept(hidden), heads(hidden)[:, :2])
    assert kept.up.data_ptr() == heads.up.data_ptr()
    assert make_step(tiny_model("llama", num_hidden_layers=1), kept, Tree.from_paths([[0]])).num_heads == 1


def changed(folder: Path, out: Path, *, architecture: str = "bottleneck", config: str | None = None) -> Path:
    """The same file with other metadata."""
    options = json.dumps({"num_heads": 3, "hidden_size": 64, "draft_vocab_size": 101, "rank": 5})
    metadata = {"format": "pt", ARCHITECTURE_KEY: architecture, CONFIG_KEY: options if config is None else config}
    save_file(load_file(folder / HEADS_FILE), out, metadata=metadata)
    return out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "bottle"}, r"can't be read.*no head architecture named 'bottle'; there are: .*medusa"),
        ({"config": "{"}, "is not JSON"),
        ({"config": "{}"}, "missing required field"),
        ({"config": '{"num_heads": 3, "hidden_size": 64, "draft_vocab_size": 101, "rank": 0}'}, "expected 1 to 64"),
        ({"config": '{"num_heads": 3, "hidden_size": 64, "draft_vocab_size": 101, "rank": "x"}'}, "Expected `int`"),
        ({"config": '{"num_heads": 65, "hidden_size": 64, "draft_vocab_size": 101}'}, "65 heads: expected 64 at most"),
        ({"config": '{"num_heads": 3, "hidden_size": 32, "draft_vocab_size": 101}'}, "this base model has size 64"),
        (
            {"config": '{"num_heads": 3, "hidden_size": 64, "draft_vocab_size": 101}'},
            r"\[3, 64, 8\]",
        ),
    ],
)
def test_wrong_files_are_refused(
    folder: Path, model: PreTrainedModel, tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_heads(changed(folder, tmp_path / "heads.safetensors", **changes), model)


def test_other_layouts_have_no_place_for_them(model: PreTrainedModel, tmp_path: Path) -> None:
    heads = BottleneckHeads(replace(CONFIG, num_heads=1), model.lm_head)
    with pytest.raises(CheckpointError, match="The layout vllm has no place for bottleneck heads: give own"):
        save_heads(heads, tmp_path, base_model_name_or_path="base", layout="vllm")

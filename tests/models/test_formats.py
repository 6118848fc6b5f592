"""Weight formats: found by what a checkpoint looks like, added by an extension."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from medusa_export.cli import main
from medusa_export.common.errors import CheckpointError
from medusa_export.models.checkpoint import FORMATS
from medusa_export.models.checkpoints import load_model, load_tokenizer, stored_weights
from medusa_export.models.formats import open_checkpoint
from medusa_export.models.gguf.checkpoint import GgufCheckpoint
from medusa_export.models.hugging_face import HuggingFaceCheckpoint
from support.extensions.npz import NpzCheckpoint
from support.gguf_files import write_gguf
from support.tiny_models import tiny_model


@pytest.fixture
def npz() -> Iterator[None]:
    """The format is registered."""
    FORMATS.register("npz", NpzCheckpoint)
    yield
    FORMATS._members.pop("npz")


@pytest.fixture
def npz_folder(tmp_path: Path) -> Path:
    """A tiny llama in that format."""
    folder = tmp_path / "tiny-npz"
    model = tiny_model("llama", num_hidden_layers=1)
    model.config.save_pretrained(folder)
    np.savez(folder / "weights.npz", **{name: tensor.numpy() for name, tensor in model.state_dict().items()})
    return folder


def test_a_format_of_an_extension(npz: None, npz_folder: Path) -> None:
    original = tiny_model("llama", num_hidden_layers=1)
    loaded = load_model(str(npz_folder), dtype=torch.float32)
    for name, tensor in original.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=0, rtol=0)
    assert load_tokenizer(str(npz_folder)) is None
    assert {weight.name for weight in stored_weights(str(npz_folder), loaded)} == set(original.state_dict())


def test_an_incomplete_checkpoint_of_an_extension_is_refused(npz: None, npz_folder: Path) -> None:
    with np.load(npz_folder / "weights.npz") as archive:
        weights = {name: archive[name] for name in archive.files}
    weights.pop("model.norm.weight")
    np.savez(npz_folder / "weights.npz", **weights)
    with pytest.raises(CheckpointError, match=r"lacks the weight model\.norm\.weight, which would be random"):
        load_model(str(npz_folder), dtype=torch.float32)
    (npz_folder / "weights.npz").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="tiny-npz could not be read"):
        load_model(str(npz_folder), dtype=torch.float32)


@pytest.mark.slow
def test_a_model_of_an_extension_is_exported_and_verified(npz: None, npz_folder: Path, tmp_path: Path) -> None:
    bundle, report = tmp_path / "bundle", tmp_path / "report.json"
    for arguments in (
        ["onnx", npz_folder, "--no-heads", "--greedy-only", "-o", bundle],
        ["verify", bundle, "--model", npz_folder, "-n", "8", "--json", report],
    ):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
    assert "weights in memory and in the files" in report.read_text()


def test_formats_are_found(tmp_path: Path, npz_folder: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    assert isinstance(open_checkpoint(str(file)), GgufCheckpoint)
    renamed = file.rename(tmp_path / "no-suffix")
    assert isinstance(open_checkpoint(str(renamed)), GgufCheckpoint)
    assert isinstance(open_checkpoint(str(npz_folder)), HuggingFaceCheckpoint)  # not registered here
    assert isinstance(open_checkpoint("someone/model"), HuggingFaceCheckpoint)


def test_a_file_of_no_known_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.bak").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match="is of no known weight format"):
        open_checkpoint(str(tmp_path / "model.safetensors.bak"))
    with pytest.raises(CheckpointError, match="There is no file"):
        open_checkpoint(str(tmp_path / "missing.gguf"))

"""Models whose weights are in files that are mapped into memory."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from medusa_export.common.errors import OutputError
from medusa_export.common.progress import ignore_progress
from medusa_export.models.checkpoints import load_model, open_model
from medusa_export.models.offload import offload
from medusa_export.verification.weights import weights_check
from support.tiny_models import tiny_model

_Usage = namedtuple("_Usage", "total used free")


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])  # tied embeddings; stacks that are made of several tensors
@torch.inference_mode()
def test_a_model_computes_with_weights_in_files(family: str, tmp_path: Path) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    (tmp_path / "weights").mkdir()
    source = str(tmp_path / "model")
    moved = offload(open_model(source, dtype=torch.bfloat16), tmp_path / "weights", ignore_progress)
    usual = load_model(source, dtype=torch.bfloat16).float()
    for name, weight in usual.named_parameters(remove_duplicate=False):
        assert torch.equal(moved.get_parameter(name), weight), name
    tied = usual.config.tie_word_embeddings
    assert (moved.lm_head.weight is moved.get_input_embeddings().weight) == tied
    files = list((tmp_path / "weights").iterdir())
    assert sum(file.stat().st_size for file in files) == 4 * sum(weight.numel() for weight in usual.parameters())
    ids = torch.tensor([[5, 17, 80]])
    torch.testing.assert_close(moved(ids).logits, usual(ids).logits)
    assert weights_check(source, moved, "bfloat16").passed


def test_a_full_disk_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    opened = open_model(str(tmp_path / "model"), dtype=torch.float32)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(0, 0, 1000))
    with pytest.raises(OutputError, match=r"of the reference take .* GB .* free: give a folder on another disk"):
        offload(opened, tmp_path, ignore_progress)

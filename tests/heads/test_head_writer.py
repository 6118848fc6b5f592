"""Heads written to disk and read again, in every layout; and heads without the deepest ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from medusa_export.cli import main
from medusa_export.common.errors import OutputError
from medusa_export.heads.files import load_heads
from medusa_export.heads.modules import MedusaHeads
from medusa_export.heads.writer import LAYOUTS, save_heads
from support.head_files import (
    MODEL,
    STATE,
    check,
    reference,
    written,
)
from support.tiny_models import VOCAB_SIZE


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_round_trip(tmp_path: Path, shared: bool, reduced: bool) -> None:
    tensors = reference(num_layers=2, shared=shared)
    if reduced:
        tensors["token_map"] = torch.arange(0, VOCAB_SIZE, 3)
    heads = load_heads(written(tmp_path / "in", tensors), MODEL)
    save_heads(heads, tmp_path / "new" / "out", base_model_name_or_path="some/base")
    modes = [path.stat().st_mode for path in (tmp_path / "new" / "out").iterdir()]
    (tmp_path / "plain").touch()
    assert set(modes) == {(tmp_path / "plain").stat().st_mode}, "files have the usual permissions"
    again = load_heads(tmp_path / "new" / "out", MODEL)
    assert again.config == heads.config
    assert torch.equal(again(STATE), heads(STATE))
    config = json.loads((tmp_path / "new" / "out" / "config.json").read_text())
    version = "2" if shared and not reduced else "1"
    assert config == {
        "medusa_num_heads": 3,
        "medusa_num_layers": 2,
        "base_model_name_or_path": "some/base",
        "version": version,
    }
    if not reduced:
        assert load_file(tmp_path / "new" / "out" / "medusa_lm_head.safetensors").keys() == tensors.keys()


def test_fresh_heads_are_saved_without_the_lm_head(tmp_path: Path) -> None:
    save_heads(MedusaHeads.fresh(2, MODEL.lm_head), tmp_path, base_model_name_or_path="base")
    names = load_file(tmp_path / "medusa_lm_head.safetensors").keys()
    assert set(names) == {f"{k}.0.linear.{part}" for k in range(2) for part in ("weight", "bias")}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = load_heads(written(tmp_path / "in", reference()), MODEL)
    save_heads(heads, tmp_path / "out", base_model_name_or_path="base")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def half(tensors: dict[str, Tensor], file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("medusa_export.heads.writer.save_file", half)
    with pytest.raises(OutputError, match="disk full"):
        save_heads(heads.truncated(1), tmp_path / "out", base_model_name_or_path="base")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("tensors", [reference(), reference(shared=True)], ids=["own", "shared"])
def test_truncated(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    heads = load_heads(written(tmp_path, tensors), MODEL)
    check(heads.truncated(2), tensors, num_heads=2)
    weights = [own.residual_layers[0].weight for own in (heads, heads.truncated(2))]
    assert weights[0].data_ptr() == weights[1].data_ptr()
    for number in (0, 4):
        with pytest.raises(ValueError, match=f"{number} of 3"):
            heads.truncated(number)


def converted(tmp_path: Path, source: Path, layout: str) -> tuple[Path, str]:
    MODEL.save_pretrained(tmp_path / "model")
    arguments = ["heads", "convert", tmp_path / "model", "--heads", source, "--format", layout, "-o", tmp_path / layout]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return tmp_path / layout, result.output


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion(tmp_path: Path, layout: str, shared: bool, num_layers: int) -> None:
    tensors = reference(num_layers=num_layers, shared=shared)
    folder, output = converted(tmp_path, written(tmp_path / "heads", tensors), layout)
    if layout == "v2" and not shared:
        assert "error: These heads have projections of their own" in output
        assert not folder.exists()
        return
    check(load_heads(folder, MODEL), tensors, num_layers=num_layers)
    names = set(load_file(folder / "medusa_lm_head.safetensors"))
    full = set(reference(num_layers=num_layers))
    bare = set(reference(num_layers=num_layers, shared=True))
    blocks = {
        f"blocks.{k}.layers.{j}.{kind}" for k in range(3) for j in range(num_layers) for kind in ("weight", "bias")
    }
    vllm_projections = {"lm_head.weight"} if shared else {f"lm_heads.{k}.weight" for k in range(3)}
    expected = {"own": bare if shared else full, "v0.1": full, "v2": bare, "vllm": blocks | vllm_projections}
    assert names == expected[layout]
    config = json.loads((folder / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    assert config["num_heads" if layout == "vllm" else "medusa_num_heads"] == 3


def test_conversion_keeps_a_reduced_vocabulary_and_the_dtype(tmp_path: Path) -> None:
    tokens = torch.arange(5, 50, 3)
    tensors = reference(shared=True) | {"token_map": tokens.int()}
    source = written(tmp_path / "heads", {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()})
    folder, output = converted(tmp_path, source, "vllm")
    assert "error" not in output
    stored = load_file(folder / "medusa_lm_head.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.int32}
    assert torch.equal(stored["token_map"], tokens.int())
    assert json.loads((folder / "config.json").read_text())["truncated_vocab_size"] == len(tokens)
    torch.testing.assert_close(load_heads(folder, MODEL)(STATE), load_heads(source, MODEL)(STATE), atol=2e-3, rtol=0)


def test_a_reduced_vocabulary_fits_no_v01(tmp_path: Path) -> None:
    """The readers of that layout project to the whole vocabulary."""
    tensors = reference(shared=True) | {"token_map": torch.arange(5, 50, 3).int()}
    folder, output = converted(tmp_path, written(tmp_path / "heads", tensors), "v0.1")
    assert "error: The layout v0.1 has no place for heads that can propose some of the tokens only" in output
    assert not folder.exists()


def test_heads_do_not_replace_the_configuration_of_a_model(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(OutputError, match="is the configuration of a llama model: give another folder"):
        save_heads(MedusaHeads.fresh(2, MODEL.lm_head), tmp_path / "model", base_model_name_or_path="base")
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    assert not (tmp_path / "model" / "medusa_lm_head.safetensors").exists()


def test_conditioned_heads_fit_no_other_layout(tmp_path: Path) -> None:
    save_heads(
        MedusaHeads.fresh(2, MODEL.lm_head, conditioned=True), tmp_path / "heads", base_model_name_or_path="base"
    )
    folder, output = converted(tmp_path, tmp_path / "heads", "vllm")
    assert "error: The layout vllm has no place for heads that are conditioned" in output
    assert not folder.exists()
    assert "error" not in converted(tmp_path, tmp_path / "heads", "own")[1]

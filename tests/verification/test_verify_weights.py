"""A loaded model is held against its files, so that an error of the loader is none of the reference too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from medusa_export.cli import main
from medusa_export.models import checkpoints
from medusa_export.models.checkpoints import load_model
from medusa_export.verification import verify
from medusa_export.verification.checks import Check, Tolerances, Verification
from medusa_export.verification.weights import CHECK, weights_check
from medusa_runtime import Bundle
from support.gguf_files import write_gguf
from support.tiny_models import SUPPORTED_FAMILIES, families, tiny_model

VOCAB = 300
_GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}


def load(source: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(str(source), dtype=dtype)


def size(model: PreTrainedModel) -> int:
    kept = set(model.state_dict())
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in kept)
    return buffers + sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", families("llama", "qwen3", "gpt2", others=SUPPORTED_FAMILIES))
def test_every_weight_of_a_folder_is_compared(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    check = weights_check(str(tmp_path), load(tmp_path), "float32")
    assert check.passed, check.notes
    assert check.compared == size(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_known(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = load(tmp_path, dtype).float()
    assert weights_check(str(tmp_path), model, str(dtype).removeprefix("torch.")).passed
    assert not weights_check(str(tmp_path), model, "float32").passed


def test_shards_and_pickles(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert weights_check(str(tmp_path / "shards"), load(tmp_path / "shards"), "float32").compared == size(model)
    model.config.save_pretrained(tmp_path / "pickle")
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin", **options)
        assert weights_check(str(tmp_path / "pickle"), load(tmp_path / "pickle"), "float32").compared == size(model)


def test_names_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    check = weights_check(str(tmp_path), load(tmp_path), "float32")
    assert check.passed, check.notes
    assert check.compared == size(model)


def test_tied_weights_that_differ_are_both_kept(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(101, 64)}))
    loaded: Any = load(tmp_path)
    check = weights_check(str(tmp_path), loaded, "float32")
    assert check.passed, check.notes
    assert check.compared == size(loaded)
    assert torch.equal(loaded.get_output_embeddings().weight, torch.ones(101, 64))
    assert not torch.equal(loaded.get_input_embeddings().weight, torch.ones(101, 64))


def test_heads_and_tables_are_ignored(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.update({"medusa_head.0.0.linear.weight": torch.zeros(64, 64)}))
    change_file(
        tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    check = weights_check(str(tmp_path), load(tmp_path), "float32")
    assert check.passed
    assert check.figures["ignored"] == 2


def change_file(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "options", "settings"),
    [
        ("llama", {}, {}),
        ("qwen3", {}, {}),
        ("gemma2", {**_GEMMA, "sliding_window": 8}, {"attention.sliding_window": 8}),
        ("gpt2", {}, {}),
        ("phi3", {"partial_rotary_factor": 0.5}, {"rope.dimension_count": 8}),
        ("starcoder2", {"sliding_window": None}, {}),
    ],
)
def test_every_tensor_of_a_gguf_is_compared(
    tmp_path: Path, family: str, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    model = tiny_model(family, vocab_size=VOCAB, **options)
    file = write_gguf(tmp_path / "tiny.gguf", model, settings)
    check = weights_check(str(file), load(file), "float32")
    assert check.passed, check.notes
    assert check.compared == size(model)


def swap(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight, attention.v_proj.weight = attention.v_proj.weight, attention.k_proj.weight


def permute(model: Any) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data = weight.data.view(4, 8, 2, 64).transpose(1, 2).reshape(64, 64)


def lose(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan


def transpose(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data.T.contiguous()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (swap, "model.layers.0.self_attn.k_proj.weight differs"),
        (permute, "model.layers.1.self_attn.q_proj.weight differs"),
        (lose, "model.layers.1.mlp.up_proj.weight differs in 1 of"),
        (transpose, r"model.layers.0.mlp.up_proj.weight is [64, 96] in the model and [96, 64] in the files"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_loader_that_errs_is_found(tmp_path: Path, kind: str, fault: Callable[[Any], None], words: str) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    model.save_pretrained(tmp_path / "folder")
    source = tmp_path / "folder" if kind == "folder" else write_gguf(tmp_path / "tiny.gguf", model)
    loaded = load(source)
    fault(loaded)
    check = weights_check(str(source), loaded, "float32")
    assert not check.passed
    assert words in " ".join(check.notes)


def test_weights_that_nobody_read_or_wrote_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a loader whose own report of them is wrong."""
    tiny_model("llama").save_pretrained(tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.input_scale"] = torch.ones(1)
        del tensors["model.norm.weight"]

    change_file(tmp_path, change)
    monkeypatch.setattr(checkpoints, "check_complete", lambda *_: None)
    check = weights_check(str(tmp_path), load(tmp_path), "float32")
    assert check.notes == [
        "model.layers.0.self_attn.q_proj.input_scale is in the files, and the model has no place for it",
        "model.norm.weight is in the model, and comes from no file",
    ]
    assert check.mismatches == 1 + 64


def test_packed_numbers_are_no_weights(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    change_file(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(101, 64, dtype=torch.int8)}))
    check = weights_check(str(tmp_path), load(tmp_path), "float32")
    assert "lm_head.weight is torch.int8 in the files" in check.notes[0]


def test_many_faults_are_counted_and_few_shown(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for parameter in loaded.parameters():
        parameter.data += 1
    check = weights_check(str(tmp_path), loaded, "float32")
    assert check.mismatches == size(model)
    assert len(check.notes) == 6


def test_verify_reports_it(
    untrained_bundle: Bundle, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing = Verification([Check("steps", compared=1)], Tolerances.of("float32"))
    monkeypatch.setattr(verify, "verify_bundle", lambda *_, **__: passing)
    arguments = ["verify", str(untrained_bundle.folder), "--model", str(tiny_model_folder), "-q"]
    arguments += ["--json", str(tmp_path / "a.json"), "--junit", str(tmp_path / "a.xml")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    check = json.loads((tmp_path / "a.json").read_text())["checks"][0]
    assert (check["name"], check["passed"]) == (CHECK, True)
    assert check["compared"] == size(tiny_model("llama"))
    assert CHECK in (tmp_path / "a.xml").read_text()
    # Exported and verified by a loader that passes over what it doesn't know, from files that hold more.
    other = Path(shutil.copytree(tiny_model_folder, tmp_path / "other"))
    change_file(other, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}))
    monkeypatch.setattr(checkpoints, "check_complete", lambda *_: None)
    arguments[3] = str(other)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    assert "up_proj.weight_scale is in the files" in " ".join(result.output.split())

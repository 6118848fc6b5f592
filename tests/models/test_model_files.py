"""Folders and files that can't be loaded say what is wrong: adapters, packed weights, damaged and absent files."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from medusa_export.common.errors import CheckpointError, ModelNotSupportedError
from medusa_export.models.checkpoints import load_model, load_tokenizer
from medusa_export.models.files import Place, check_file, weight_files
from medusa_export.step.attention import ATTENTION_NAME
from support.tiny_models import tiny_model

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
ADAPTERS = {
    "LORA": LoraConfig(task_type="CAUSAL_LM"),
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


def load(source: Path | str, **options: Any) -> Any:
    return load_model(str(source), dtype=torch.float32, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved llama."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def refusal(source: Path | str) -> str:
    with pytest.raises(CheckpointError) as error:
        load(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def save_adapter(kind: str, folder: Path) -> None:
    model: Any = tiny_model("llama")
    model.name_or_path = "someone/the-base"
    get_peft_model(model, ADAPTERS[kind]).save_pretrained(folder, save_embedding_layers=False)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("has_peft", [True, False])
def test_an_adapter_beside_a_model_is_not_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, has_peft: bool
) -> None:
    if not has_peft:
        monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: False)
    save_adapter(kind, folder)
    words = refusal(folder)
    assert f" {kind} adapter (adapter_config.json) beside base weights" in words
    assert ("can't be merged" in words) == (kind == "PROMPT_TUNING")
    assert ("merge_and_unload" in words) == (kind != "PROMPT_TUNING")
    with pytest.raises(CheckpointError, match="adapter"):
        load_tokenizer(str(folder))


def test_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    save_adapter("LORA", tmp_path)
    assert re.search(
        r"a LORA adapter .*, not a whole model\. Merge it into its base, someone/the-base,", refusal(tmp_path)
    )


def test_an_adapter_is_known_by_its_weights(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    assert "holds an adapter (adapter_model.bin) beside base weights" in refusal(folder)


def test_a_damaged_adapter_is_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[" * 10_000)
    assert "holds an adapter (adapter_config.json)" in refusal(folder)


def test_an_adapter_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path, monkeypatch, "someone/adapter", lambda folder: save_adapter("LORA", folder))
    assert "someone/adapter holds a LORA adapter" in refusal("someone/adapter")


def cached(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, fill: Any) -> Path:
    """Puts a repository into a cache of the hub that stands alone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    fill(repository / "snapshots" / ("0" * 40))
    return repository / "snapshots" / ("0" * 40)


def test_a_model_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cached(tmp_path, monkeypatch, "someone/tiny", tiny_model("llama").save_pretrained)
    assert torch.equal(load("someone/tiny").lm_head.weight, tiny_model("llama").lm_head.weight)
    assert Place.of("someone/tiny").name == Place.of(str(snapshot)).name == "tiny"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_text(LFS), "git lfs pull"),
        (lambda file: file.symlink_to("blobs/nowhere"), "is a link to blobs/nowhere, which is not there"),
        (lambda file: file.mkdir(), "is a folder"),
    ],
)
def test_a_file_that_is_none(folder: Path, name: str, change: Any, words: str) -> None:
    (folder / name).unlink()
    change(folder / name)
    assert words in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "."])
def test_what_may_not_be_read(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so that the refusal of the system is put in place."""
    forbidden = folder / name

    def refuse(function: Any) -> Any:
        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            if path == forbidden:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *arguments, **options)

        return call

    monkeypatch.setattr(Path, "open", refuse(Path.open))
    monkeypatch.setattr(Path, "iterdir", refuse(Path.iterdir))
    assert "(Permission denied): make it readable" in refusal(folder)


def test_a_gguf_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(LFS)
    assert "git lfs pull" in refusal(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"ggml, of long ago")
    assert "is no GGUF file" in refusal(tmp_path / "model.gguf")
    (tmp_path / "other.gguf").symlink_to("nowhere.gguf")
    assert "is a link to nowhere.gguf" in refusal(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Model.safetensors", "found Model.safetensors: rename it to model.safetensors"),
        ("weights.pt", "found weights.pt"),
        ("tf_model.h5", "found tf_model.h5"),
    ],
)
def test_weights_under_another_name(folder: Path, name: str, words: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert words in refusal(folder)


def test_a_config_under_another_name(folder: Path) -> None:
    (folder / "config.json").rename(folder / "Config.json")
    assert "but holds Config.json: rename it" in refusal(folder)
    (folder / "Config.json").rename(folder / "params.json")
    assert "params.json: it is in its authors' layout" in refusal(folder)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A saved llama in four shards."""
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path


def test_missing_shards_are_counted(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[0].unlink()
    assert re.search(rf"names {shards[0].name}, not found beside it", refusal(sharded))
    shards[1].unlink()
    assert f"names {shards[0].name} and 1 more of {len(shards)} shards" in refusal(sharded)
    shards[2].write_text(LFS)


def test_a_shard_that_was_not_pulled(sharded: Path) -> None:
    sorted(sharded.glob("model-*.safetensors"))[1].write_text(LFS)
    assert "git lfs pull" in refusal(sharded)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../elsewhere.safetensors"}}',
        '{"weight_map": {"a": "model.safetensors.index.json"}}',
        "[" * 10_000,
    ],
)
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert "restore the file" in refusal(sharded)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights(tmp_path: Path, shards: int) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    items = list(model.state_dict().items())
    parts = [dict(items[i::shards]) for i in range(shards)]
    names = [f"pytorch_model-{i}.bin" for i in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, tmp_path / name)
    if shards > 1:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight)
    last = tmp_path / names[-1]
    last.write_bytes(last.read_bytes()[:-500])
    assert f"{names[-1]} ends too early" in refusal(tmp_path)


@settings(max_examples=60)
@given(st.integers(min_value=0, max_value=3000), st.binary(max_size=20))
def test_no_cut_or_foreign_file_passes_for_weights(
    tmp_path_factory: pytest.TempPathFactory, kept: int, tail: bytes
) -> None:
    """A file of safetensors that lacks its end is refused, whatever the place of the cut."""
    folder = tmp_path_factory.mktemp("cut")
    save_file({"a": torch.arange(500.0), "b": torch.arange(100.0)}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    check_file(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(whole[: min(kept, len(whole) - 21)] + tail)
    with pytest.raises(CheckpointError):
        weight_files(Place.of(str(folder)))


# Weights that the model has no place for


def change_weights(folder: Path, change: dict[str, torch.Tensor]) -> None:
    save_file({**load_file(folder / "model.safetensors"), **change}, folder / "model.safetensors", {"format": "pt"})


def test_weights_of_nobody_are_named(folder: Path) -> None:
    change_weights(folder, {"model.layers.1.extra.weight": torch.zeros(3)})
    assert "has no place for it: model.layers.1.extra.weight. Correct its config.json" in refusal(folder)


def test_biases_without_their_setting(tmp_path: Path) -> None:
    tiny_model("llama", attention_bias=True).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_bias": False}))
    words = refusal(tmp_path)
    assert words.startswith("8 tensors of")
    assert "model.layers.0.self_attn.k_proj.bias" in words
    assert "and 5 more. They are biases" in words


@pytest.mark.parametrize("suffix", ["weight_scale", "input_scale", "qzeros", "weight.absmax", "SCB"])
def test_scales_without_their_setting(folder: Path, suffix: str) -> None:
    change_weights(folder, {f"model.layers.{i}.mlp.up_proj.{suffix}": torch.ones(1) for i in range(2)})
    assert "belong to packed weights" in refusal(folder)


def test_an_adapter_that_was_saved_with_its_model(tmp_path: Path) -> None:
    model: Any = get_peft_model(tiny_model("llama"), ADAPTERS["LORA"])
    tiny_model("llama").config.save_pretrained(tmp_path)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    assert "belong to a LoRA adapter within the weights" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_what_the_class_ignores_may_be_there(folder: Path, name: str) -> None:
    change_weights(folder, {name: torch.ones(8)})
    load(folder)


def test_a_tied_weight_may_be_there_twice(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, {"lm_head.weight": model.lm_head.weight.clone()})
    assert torch.equal(load(tmp_path).lm_head.weight, model.lm_head.weight)


def test_heads_may_be_there(folder: Path) -> None:
    change_weights(folder, {f"medusa_head.{i}.0.linear.weight": torch.zeros(64, 64) for i in range(3)})
    load(folder)


# Packed weights and families without the interface


@pytest.mark.parametrize("method", ["hqq", "eetq", "mxfp4", "modelopt", "quark"])
def test_packed_weights_are_named(folder: Path, method: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": method}}))
    assert f"weights packed by {method} (quantization_config" in refusal(folder)
    assert "those that can be read are awq, bitsandbytes, compressed-tensors" in refusal(folder)


# Causal models of transformers whose layers choose their attention themselves, with the settings of small ones.
_OWN_ATTENTION = {
    "openai-gpt": {},
    "xglm": {},
}


@pytest.mark.parametrize("kind", _OWN_ATTENTION)
def test_a_family_that_chooses_its_attention_is_named(tmp_path: Path, kind: str) -> None:
    """The model is refused before its weights are read: the folder holds none."""
    config = AutoConfig.for_model(kind, vocab_size=101, **_OWN_ATTENTION[kind])
    assert not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._can_set_attn_implementation()
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotSupportedError, match="don't go through transformers' attention interface"):
        load(tmp_path, attn_implementation=ATTENTION_NAME)

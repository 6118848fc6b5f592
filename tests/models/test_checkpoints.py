"""Base models and tokenizers from real files: what loads is what was saved, and what can't load says why."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from medusa_export.common.errors import CheckpointError, ModelNotSupportedError
from medusa_export.compat.gguf import gguf_cache
from medusa_export.models.checkpoints import load_model, load_tokenizer, save_model, save_tokenizer
from medusa_runtime.text.tokenizer import Tokenizer as RuntimeTokenizer
from support.gguf_files import CHAT_TEMPLATE, write_gguf
from support.tiny_models import tiny_model
from support.tiny_tokenizer import make_tokenizer

PROMPT = torch.tensor([[5, 17, 80, 3, 44]])


def load(source: Path | str) -> PreTrainedModel:
    return load_model(str(source), dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved llama."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change_weights(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **{k: v for k, v in change.items() if v is not None}}
    kept = {name: tensor for name, tensor in tensors.items() if change.get(name, tensor) is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **change: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def test_a_folder_loads_as_it_was_saved(folder: Path) -> None:
    model = load(folder)
    assert torch.equal(model(PROMPT).logits, tiny_model("llama")(PROMPT).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_whoever_may_read_files_may_read_a_model_that_was_saved(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), make_tokenizer(), tmp_path / "model")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_dtype_and_attention_are_chosen(folder: Path) -> None:
    model = load_model(str(folder), dtype=torch.float16, attn_implementation="eager")
    assert model.lm_head.weight.dtype == torch.float16
    assert model.config._attn_implementation == "eager"


def test_a_tied_lm_head_is_not_missing(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path)(PROMPT).logits, tiny_model("qwen3")(PROMPT).logits)


def test_a_merged_checkpoint_loads_as_its_base_in_silence(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_weights(folder, {"medusa_head.0.0.linear.weight": torch.zeros(64, 64)})
    change_config(folder, medusa_num_heads=2, medusa_num_layers=1)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    model = load(folder)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert torch.equal(model(PROMPT).logits, tiny_model("llama")(PROMPT).logits)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(load(tmp_path)(PROMPT).logits, tiny_model("llama")(PROMPT).logits)


def test_missing_weights_are_named(folder: Path) -> None:
    change_weights(folder, {"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks the weight lm_head\.weight, which would be random"):
        load(folder)


def test_misshapen_weights_are_named(folder: Path) -> None:
    change_weights(folder, {"lm_head.weight": torch.zeros(90, 64)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* \[90, 64\].* \[101, 64\]"):
        load(folder)


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends too early: it has \d+ of \d+ bytes") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: expected model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds no settings"),
        ('{"model_type": "banana"}', "does not know .*'banana'"),
        ("{}", "does not know"),
        ('{"medusa_num_heads": 5, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}', "heads, .*lmsys/vicuna-7b-v1.3"),
        ('{"model_type": "clip"}', "no causal language model"),
    ],
)
def test_unusable_config(folder: Path, content: str, words: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        load(folder)


def test_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    tiny_model("t5").config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotSupportedError, match="encoder"):
        load(tmp_path)


def test_code_in_a_checkpoint_is_not_run(folder: Path) -> None:
    marker = folder / "marker"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')")
    change_config(folder, model_type="banana", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    with pytest.raises(CheckpointError, match="banana"):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("source", ["no/such/folder", "./nothing", "nothing", "/nothing/here"])
def test_missing_folder(source: str) -> None:
    for function in (load, load_tokenizer):
        with pytest.raises(CheckpointError, match="no folder"):
            function(source)


def test_missing_gguf(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file"):
        load(tmp_path / "model.gguf")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "tiny.gguf").touch()
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: give the path"):
        load(tmp_path)


def test_a_file_of_another_kind(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no known weight format"):
        load(folder / "model.safetensors")


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for function in (load, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"someone/something .* hub"):
            function("someone/something")


# Tokenizers


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast  # not annotated in transformers
    tokenizer: PreTrainedTokenizerFast = fast(tokenizer_object=backend, unk_token="<unk>", chat_template=CHAT_TEMPLATE)
    return tokenizer


def test_tokenizer_round_trip(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(word_tokenizer(), folder)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer is not None
    save_tokenizer(tokenizer, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("b a c").ids == [2, 1, 0]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_is_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """The form in checkpoints of the first Llama, and of those trained from it."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Why is the sky blue?", "The quick brown fox jumps over the lazy dog."] * 20),
        model_writer=written,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **named}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer is not None
    save_tokenizer(tokenizer, tmp_path / "bundle")
    ours = RuntimeTokenizer.load(tmp_path / "bundle")
    assert ours is not None
    text = "Why does the fox jump? 🦊"
    assert ours.encode(text) == tokenizer(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == text


def test_no_tokenizer(folder: Path) -> None:
    assert load_tokenizer(str(folder)) is None


def test_damaged_tokenizer(folder: Path) -> None:
    save_tokenizer(word_tokenizer(), folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer of .* could not be read"):
        load_tokenizer(str(folder))


def test_slow_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ByT5Tokenizer"):
        save_tokenizer(ByT5Tokenizer(), tmp_path)


# GGUF


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=300))
    return tmp_path / "tiny.gguf"


def test_gguf_loads_as_an_ordinary_model(gguf_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, expected = load(gguf_file), tiny_model("llama", vocab_size=300)
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)
    assert not hasattr(model.config, "quantization_config")
    assert getattr(model, "hf_quantizer", None) is None
    model.to(torch.float16).save_pretrained(gguf_file.parent / "saved")
    assert load_model(str(gguf_file.parent / "saved"), dtype=torch.float16).dtype == torch.float16


def test_gguf_tokenizer(gguf_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(gguf_file))
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("abba")["input_ids"]) == "abba"
    assert len(tokenizer("ab")["input_ids"]) == 1
    assert tokenizer.chat_template == CHAT_TEMPLATE
    save_tokenizer(tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_gguf_without_tokenizer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), with_tokenizer=False)
    assert load_tokenizer(str(tmp_path / "tiny.gguf")) is None


@pytest.mark.parametrize("length", [0, 3, 60, 5000, -100])
def test_truncated_gguf(gguf_file: Path, length: int) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf") as error:
        load(gguf_file)
    assert "\n" not in str(error.value)


def test_a_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "banana")
    writer.add_name("odd")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="banana"):
        load(tmp_path / "odd.gguf")


def test_a_gguf_is_parsed_once(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    start = gguf.GGUFReader.__init__

    def count(reader: gguf.GGUFReader, path: Path) -> None:
        parsed.append(path)
        start(reader, path)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", count)
    with gguf_cache():
        load(gguf_file)
        load_tokenizer(str(gguf_file))
    assert len(parsed) == 1
    load(gguf_file)
    assert len(parsed) == 2


def test_gguf_cache_reads_what_gguf_reads(gguf_file: Path) -> None:
    reader = gguf.GGUFReader
    plain = reader(gguf_file)
    with gguf_cache():
        cached = gguf.GGUFReader(str(gguf_file))
        assert gguf.GGUFReader(gguf_file) is cached
    assert gguf.GGUFReader is reader
    assert list(cached.fields) == list(plain.fields)
    assert all(cached.fields[name].contents() == plain.fields[name].contents() for name in plain.fields)
    for ours, theirs in zip(cached.tensors, plain.tensors, strict=True):
        assert ours.name == theirs.name
        assert np.array_equal(ours.data, theirs.data)


def test_gguf_cache_is_undone_after_an_error() -> None:
    before = gguf.GGUFReader, gguf.GGUFReader._get, gguf.get_tensor_name_map
    with pytest.raises(RuntimeError), gguf_cache(), gguf_cache():
        raise RuntimeError
    assert before == (gguf.GGUFReader, gguf.GGUFReader._get, gguf.get_tensor_name_map)


def test_gguf_cache_does_nothing_without_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_export.compat.gguf.find_spec", lambda _: None)
    reader = sys.modules["gguf"].GGUFReader
    with gguf_cache():
        assert sys.modules["gguf"].GGUFReader is reader

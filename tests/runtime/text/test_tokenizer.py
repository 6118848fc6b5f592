"""The tokenizer gives the same ids and texts as transformers from the same folder, and refuses bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from medusa_runtime.errors import BundleError, RequestError
from medusa_runtime.text.tokenizer import Tokenizer
from support.tokenizer_folders import load, save
from support.tokenizer_kinds import (
    KINDS,
    SENTENCES,
    byte_fallback,
    byte_level,
    plain_words,
    word_piece,
)

TEXTS = [
    *SENTENCES,
    "",
    " ",
    "  two leading spaces",
    "trailing ",
    "unseen: ຂອບໃຈ 🦜 \u200d \x00 \ufffd",
    "<s> hi </s> <|im_start|>user<|im_end|> <think> x",
    "do n't . You 're right , he 's not !",
]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(request.param), KINDS[request.param](), clean_up_tokenization_spaces=True)


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Tokenizer, Any]:
    return load(folder), AutoTokenizer.from_pretrained(folder)


def test_encode_and_decode_equal_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(np.array(ids), skip_special_tokens=False) == theirs.decode(ids)


@settings(max_examples=40)
@given(data=st.data())
def test_any_text_and_ids_equal_transformers(pair: tuple[Tokenizer, Any], data: st.DataObject) -> None:
    ours, theirs = pair
    text = data.draw(st.text())
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 5)))
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_attributes_equal_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.named_tokens == theirs.special_tokens_map
    assert set(theirs.all_special_ids) <= ours.special_ids
    assert ours.cleans_up is (type(theirs.backend_tokenizer.model).__name__ != "BPE")


def test_clean_up_is_off_unless_asked_for(tmp_path: Path) -> None:
    folder = save(tmp_path, word_piece(), clean_up_tokenization_spaces=False)
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("it does not stop . fun !")
    assert ours.decode(ids) == theirs.decode(ids)
    assert " ." in ours.decode(ids)
    assert ours.decode(ids, clean_up=True) == theirs.decode(ids, clean_up_tokenization_spaces=True)


def test_clean_up_of_bpe_needs_a_second_setting(tmp_path: Path) -> None:
    insisting = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    folder = save(tmp_path, byte_level(), clean_up_tokenization_spaces=True, **insisting)
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("stop . fun !")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "stop. fun!"


def test_bos_setting_in_configuration_counts_as_in_transformers(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    save(tmp_path, backend)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True, "add_eos_token": True}))
    assert load(tmp_path).encode("hello") == AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"]


def test_saved_bos_setting_is_kept(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = None
    save(tmp_path, backend, add_bos_token=True, add_eos_token=True)
    ids = load(tmp_path).encode("hello")
    assert ids == AutoTokenizer.from_pretrained(tmp_path)("hello")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 1)


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=64, pad_id=1, pad_token="</s>")
    save(tmp_path, backend)
    text = SENTENCES[0]
    assert load(tmp_path).encode(text) == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]


def test_split_special_tokens(tmp_path: Path) -> None:
    save(tmp_path, byte_level(), split_special_tokens=True)
    text = "a</s><think>"
    assert load(tmp_path).encode(text) == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]


@pytest.mark.parametrize("listed", [False, True])
def test_tokens_listed_only_in_the_configuration(tmp_path: Path, listed: bool) -> None:
    """Older layouts: special_tokens_map.json, added_tokens_decoder, additional_special_tokens."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "<end>", "lstrip": True, "special": False},
        "image_token": "<image>",
        "unk_token": None,
        "additional_special_tokens": ["<tool>", "</tool>"],
    }
    if listed:
        config["added_tokens_decoder"] = {
            "7": {"content": "<think>", "special": True, "rstrip": True},
            "1": {"content": "</s>", "special": False},
        }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": {"content": "<|im_end|>", "normalized": False}, "bos_token": "<|im_start|>"})
    )
    ours, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.named_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    for text in ("x <end> <image><tool> a </tool> <think>  b</s>", *TEXTS):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_decoder_steps() -> None:
    assert Tokenizer(byte_level()).decoder_steps == ("ByteLevel",)
    assert Tokenizer(byte_fallback()).decoder_steps == ("Replace", "ByteFallback", "Fuse", "Strip")
    assert Tokenizer(plain_words()).decoder_steps == ()


def test_no_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"eos_token": {"lstrip": true}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", b'{"additional_special_tokens": [3]}'),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b'{"chat_template": {"default": 3}}'),
        ("special_tokens_map.json", b'"x"'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_corrupt_files(tmp_path: Path, name: str, content: bytes) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=name if "jinja" in name else "json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("text", "words"), [("a\ud800", "position 1"), (b"a", "bytes"), (None, "NoneType")])
def test_invalid_text_is_refused(text: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Tokenizer(byte_level()).encode(text)


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_invalid_ids_are_refused(token_id: int) -> None:
    ours = Tokenizer(byte_level())
    with pytest.raises(RequestError, match=str(token_id)):
        ours.decode([5, token_id])
    with pytest.raises(RequestError, match=str(token_id)):
        ours.token(token_id)


def test_jinja_is_imported_only_for_a_chat() -> None:
    code = (
        "import sys, medusa_runtime.text.tokenizer, medusa_runtime.text.stream;"
        "sys.exit(any(name in sys.modules for name in ('jinja2', 'torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

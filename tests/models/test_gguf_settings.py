"""GGUF metadata: what transformers doesn't read is read here, with llama.cpp's meaning, or refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from medusa_export.common.errors import CheckpointError
from medusa_export.models.checkpoints import load_tokenizer, save_tokenizer
from medusa_runtime.text.tokenizer import Tokenizer as RuntimeTokenizer
from support.gguf_files import VOCAB, assert_same, load, refusal, write_gguf
from support.tiny_models import SLIDING_WINDOW, tiny_model

_FULL = "full_attention"
_GEMMA3 = {
    "num_hidden_layers": 7,
    "layer_types": ["sliding_attention"] * 5 + [_FULL, "sliding_attention"],
    "query_pre_attn_scalar": 16,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        _FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
}
# A model of each architecture, and what llama.cpp's converter writes besides the usual.
_MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"head_dim": 32, "num_key_value_heads": 4}, {}),
    "mistral": ({"sliding_window": None}, {}),
    "qwen2": ({"use_sliding_window": False}, {"rope.freq_base": 1000000.0}),
    "qwen3": ({"head_dim": 32, "rms_norm_eps": 1e-5}, {}),
    "phi3": (
        {"partial_rotary_factor": 0.5, "sliding_window": SLIDING_WINDOW},
        {"rope.dimension_count": 8, "attention.sliding_window": SLIDING_WINDOW},
    ),
    "gemma2": (
        {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
        {
            "attention.sliding_window": SLIDING_WINDOW,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3_text": (
        {**_GEMMA3, "tie_word_embeddings": True},
        {
            "attention.sliding_window": SLIDING_WINDOW,
            "rope.freq_base_swa": 300.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 4.0,
        },
    ),
    "starcoder2": (
        {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"rope.freq_base": 300.0},
    ),
    "gpt2": ({"n_positions": 64, "layer_norm_epsilon": 1e-3}, {}),
}


@pytest.mark.parametrize("family", _MODELS)
def test_each_architecture_is_read_whole(tmp_path: Path, family: str) -> None:
    options, written = _MODELS[family]
    if family == "qwen2":
        options = {**options, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
    model = tiny_model(family, vocab_size=VOCAB, **options)
    assert_same(write_gguf(tmp_path / "tiny.gguf", model, written), model)


def test_a_llama_by_the_name_of_mistral_has_no_window(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    assert_same(write_gguf(tmp_path / "tiny.gguf", model, name="mistral"), model)


def test_biases_are_read(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB, attention_bias=True, mlp_bias=True)
    assert_same(write_gguf(tmp_path / "tiny.gguf", model), model)


@pytest.mark.parametrize("extra", [{}, {"num_hidden_layers": 3}])
def test_a_pattern_of_windows(tmp_path: Path, extra: dict[str, int]) -> None:
    layers = ["sliding_attention", _FULL, "sliding_attention"]
    rope = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in layers}
    options: dict[str, Any] = {"layer_types": layers, "query_pre_attn_scalar": 16, "rope_parameters": rope}
    model = tiny_model("gemma3_text", vocab_size=VOCAB, tie_word_embeddings=True, **options)
    for pattern in (2, [True, False, True]):
        written = {"attention.sliding_window": SLIDING_WINDOW, "attention.sliding_window_pattern": pattern}
        assert_same(write_gguf(tmp_path / "tiny.gguf", model, written), model)
    # Without a window all layers see everything.
    model.config.layer_types = [_FULL] * 3
    whole = tiny_model(
        "gemma3_text", vocab_size=VOCAB, tie_word_embeddings=True, **{**options, "layer_types": [_FULL] * 3}
    )
    assert_same(write_gguf(tmp_path / "tiny.gguf", model), whole)


# Refusals, ends of text


@pytest.mark.parametrize(
    ("key", "value", "harmless"),
    [
        ("attention.clamp_kqv", 8.0, 0.0),
        ("attention.causal", False, True),
        ("attention.scale", 0.5, 0.0),
        ("expert_count", 8, 0),
        ("logit_scale", 16.0, 1.0),
        ("residual_scale", 0.2, 0.0),
        ("attention.sliding_window", 8, 512),
        ("attention.value_length", 8, 16),
        ("rope.dimension_count", 8, 16),
        ("rope.scaling.type", "banana", "none"),
        ("rope.scaling.attn_factor", 1.2, 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.1, 0.0),
        ("rope.scaling.alpha", 1000.0, 1.0),
        ("feed_forward_length", [96, 64], 96),
        ("attention.head_count_kv", [2, 1], 2),
        ("a_key_of_tomorrow", "yes", None),
    ],
)
def test_what_can_not_be_kept_is_named(tmp_path: Path, key: str, value: Any, harmless: Any) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    words = refusal(write_gguf(tmp_path / "tiny.gguf", model, {key: value}))
    assert key in words or "keys and values of more than one size" in words
    assert_same(write_gguf(tmp_path / "tiny.gguf", model, {key: harmless}), model)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"general.type": "adapter", "adapter.type": "lora"}, "type 'adapter'. Merge it into its base"),
        ({"general.type": "mmproj"}, "type 'mmproj'"),
        ({"split.count": 3}, "one of 3 parts: join them"),
    ],
)
def test_a_file_that_is_no_whole_model(tmp_path: Path, extra: dict[str, Any], words: str) -> None:
    assert words in refusal(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), extra=extra, with_tokenizer=False))


def test_an_architecture_that_is_not_read_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "qwen3moe")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "architecture 'qwen3moe'; those that can be read are llama, " in refusal(tmp_path / "tiny.gguf")


def test_a_tensor_of_nobody_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    extra = {"blk.1.attn_gate.weight": np.zeros((4, 4), np.float32)}
    assert "has no place for it: blk.1.attn_gate.weight" in refusal(
        write_gguf(tmp_path / "a.gguf", model, tensors=extra)
    )


def test_a_missing_size_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=VOCAB), {"context_length": None})
    assert "lacks llama.context_length" in refusal(file)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, 257),
        ({"tokenizer.ggml.eot_token_id": 5}, [257, 5]),
        ({"tokenizer.ggml.eot_token_id": 257, "tokenizer.ggml.eom_token_id": 7}, [257, 7]),
        ({"tokenizer.ggml.eot_token_id": 2**32 - 1}, 257),
    ],
)
def test_all_tokens_that_end_a_turn_are_kept(tmp_path: Path, extra: dict[str, int], expected: object) -> None:
    model = load(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=VOCAB), extra=extra))
    assert model.config.eos_token_id == expected
    assert model.generation_config.eos_token_id == expected


def test_a_vocabulary_without_an_end_has_none(tmp_path: Path) -> None:
    model = load(write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), with_tokenizer=False))
    assert model.config.eos_token_id is None


@pytest.mark.parametrize(
    ("pre", "digits"), [("gpt-2", 1), ("smollm", 2), ("command-r", 2), ("qwen2", 2), ("stablelm2", 2), ("llama-bpe", 1)]
)
def test_text_is_split_as_the_file_says(tmp_path: Path, pre: str, digits: int) -> None:
    """Two digits are a token of this vocabulary, if the split leaves them together."""
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "a.gguf", tiny_model("llama", vocab_size=VOCAB), pre=pre)))
    assert tokenizer is not None
    save_tokenizer(tokenizer, tmp_path)
    ours = RuntimeTokenizer.load(tmp_path)
    assert ours is not None
    assert len(ours.encode("12")) == digits
    assert ours.decode(ours.encode("ab 12 c\n\n34")) == "ab 12 c\n\n34"


@pytest.mark.parametrize(("pre", "words"), [("banana", "'banana'"), (None, "doesn't say how")])
def test_text_that_is_split_in_another_way_is_refused(tmp_path: Path, pre: str | None, words: str) -> None:
    file = write_gguf(tmp_path / "a.gguf", tiny_model("llama", vocab_size=VOCAB), pre=pre)
    with pytest.raises(CheckpointError, match=rf"{words}.*tokenizer\.ggml\.pre.*with_tokenizer=False"):
        load_tokenizer(str(file))


def test_the_name_needs_no_certain_case(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    for name in ("model.GGUF", "model"):
        assert_same(write_gguf(tmp_path / name, model), model)

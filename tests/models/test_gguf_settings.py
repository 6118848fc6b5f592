"""GGUF metadata: what transformers doesn't read is read here, with llama.cpp's meaning, or refused by its name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from medusa_export.common.errors import CheckpointError, ModelNotSupportedError
from medusa_export.models.checkpoints import load_model, load_tokenizer, save_tokenizer
from medusa_export.models.gguf.metadata import Metadata
from medusa_export.models.gguf.settings import apply_settings
from medusa_export.models.supported import short_positions
from medusa_runtime.text.tokenizer import Tokenizer as RuntimeTokenizer
from support.gguf_files import write_gguf
from support.tiny_models import SLIDING_WINDOW, tiny_config, tiny_model

VOCAB = 300
PROMPT = torch.arange(24).unsqueeze(0) * 7 % 250
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def load(file: Path) -> PreTrainedModel:
    return load_model(str(file), dtype=torch.float32)


def assert_same(file: Path, expected: PreTrainedModel) -> None:
    torch.testing.assert_close(load(file)(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)


def refusal(file: Path) -> str:
    with pytest.raises((CheckpointError, ModelNotSupportedError)) as error:
        load(file)
    assert "\n" not in str(error.value)
    return str(error.value)


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


# Positions


def scaled_model(**rope: Any) -> PreTrainedModel:
    parameters = {"rope_theta": 10000.0, **rope}
    return tiny_model("llama", vocab_size=VOCAB, rope_parameters=parameters, max_position_embeddings=128)


def test_linear_positions(tmp_path: Path) -> None:
    model = scaled_model(rope_type="linear", factor=4.0)
    for written in (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 4.0},  # llama.cpp takes it for linear
        {"rope.scale_linear": 4.0},
    ):
        assert_same(write_gguf(tmp_path / "tiny.gguf", model, written), model)
    written = {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}
    assert_same(write_gguf(tmp_path / "tiny.gguf", model, written), scaled_model(rope_type="default"))


def test_yarn_positions(tmp_path: Path) -> None:
    written: dict[str, Any] = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    usual: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
    model = scaled_model(**usual, original_max_position_embeddings=32)
    file = write_gguf(tmp_path / "tiny.gguf", model, written | {"rope.scaling.original_context_length": 32})
    assert_same(file, model)
    plain = scaled_model(rope_type="default")
    assert not torch.allclose(load(file)(PROMPT).logits, plain(PROMPT).logits, atol=0.1)
    # Without the original length it is that of the context; the factor of attention multiplies the usual one.
    model = scaled_model(
        **usual,
        original_max_position_embeddings=128,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=1.5 * (1 + 0.1 * math.log(4)),
    )
    written |= {"rope.scaling.attn_factor": 1.5, "rope.scaling.yarn_ext_factor": 1.0}
    written |= {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0}
    assert_same(write_gguf(tmp_path / "tiny.gguf", model, written), model)


def llama3_factors(theta: float, rotated: int, factor: float, original: int) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1's scaling."""
    factors = []
    for i in range(0, rotated, 2):
        wavelength = 2 * math.pi * theta ** (i / rotated)
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_factors_of_llama_3(tmp_path: Path) -> None:
    model = scaled_model(**LLAMA3, original_max_position_embeddings=64)
    factors = llama3_factors(10000.0, 16, 8.0, 64)
    assert 1 < factors[2] < 8
    file = write_gguf(tmp_path / "tiny.gguf", model, tensors={"rope_freqs.weight": factors})
    assert_same(file, model)
    plain = scaled_model(rope_type="default")
    assert not torch.allclose(load(file)(PROMPT).logits, plain(PROMPT).logits, atol=0.1)
    file = write_gguf(tmp_path / "tiny.gguf", model, tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert_same(file, plain)


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (np.linspace(1, 3, 8, dtype=np.float32), "aren't those of Llama 3.1's scaling"),
        (np.full(4, 2, np.float32), "has 4 factors in rope_freqs.weight for 8 frequencies"),
    ],
)
def test_other_factors_are_refused(tmp_path: Path, factors: np.ndarray, words: str) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    assert words in refusal(write_gguf(tmp_path / "tiny.gguf", model, tensors={"rope_freqs.weight": factors}))


def test_positions_scaled_twice_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    factors = {"rope_freqs.weight": llama3_factors(10000.0, 16, 8.0, 64)}
    assert "twice" in refusal(write_gguf(tmp_path / "tiny.gguf", model, {"rope.scaling.factor": 2.0}, tensors=factors))


FACTORS: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 20,
    "short_factor": [1.0, 1.5] * 4,
    "long_factor": [2.0, 3.0] * 4,
    "attention_factor": 1.25,
}
LONGROPE: dict[str, Any] = {"rope_parameters": FACTORS, "original_max_position_embeddings": 20}
LONGROPE_KEYS = {"rope.scaling.original_context_length": 20, "rope.scaling.attn_factor": 1.25}


def longrope_factors(size: int = 8) -> dict[str, np.ndarray]:
    return {
        f"rope_factors_{kind}.weight": np.array(FACTORS[f"{kind}_factor"][:size], np.float32)
        for kind in ("long", "short")
    }


def test_longrope_has_both_sets_of_factors(tmp_path: Path) -> None:
    model = tiny_model("phi3", vocab_size=VOCAB, partial_rotary_factor=1.0, **LONGROPE)
    file = write_gguf(tmp_path / "tiny.gguf", model, LONGROPE_KEYS, tensors=longrope_factors())
    loaded = load(file)
    assert short_positions(loaded) == 20
    for prompt in (PROMPT, PROMPT[:, :20]):
        torch.testing.assert_close(loaded(prompt).logits, model(prompt).logits, rtol=1e-4, atol=1e-4)


def test_longrope_without_all_its_numbers_is_refused(tmp_path: Path) -> None:
    model = tiny_model("phi3", vocab_size=VOCAB, partial_rotary_factor=1.0, **LONGROPE)
    words = "scales positions by LongRoPE, but lacks"
    assert words in refusal(write_gguf(tmp_path / "a.gguf", model, LONGROPE_KEYS, tensors=longrope_factors(4)))
    assert words in refusal(write_gguf(tmp_path / "b.gguf", model, tensors=longrope_factors()))


def ggml_angles(written: dict[str, Any], factors: np.ndarray | None, position: int) -> tuple[np.ndarray, float]:
    """The angles by which llama.cpp rotates the pairs of a head of 16, and the factor on their sine and cosine."""
    theta, size = written["rope.freq_base"], 16
    pair = np.arange(size // 2)
    plain = position * theta ** (-2 * pair / size) / (1 if factors is None else factors)
    factor = written.get("rope.scaling.factor", 1.0)
    kind = written.get("rope.scaling.type", "linear")
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "none" or factor == 1:
        return plain, 1.0
    original = written["rope.scaling.original_context_length"]

    def border(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(0.0, math.floor(border(written["rope.scaling.yarn_beta_fast"])))
    high = min(size - 1.0, math.ceil(border(written["rope.scaling.yarn_beta_slow"])))
    kept = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)
    scale = written["rope.scaling.attn_factor"] * (1 + 0.1 * math.log(factor))
    return plain / factor * (1 - kept) + plain * kept, scale


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["none", "linear", "yarn", "llama3"]),
    st.floats(1, 64, width=32),
    st.floats(500, 2_000_000, width=32),
    st.sampled_from([32, 64, 2048, 8192]),
    st.floats(0.5, 2, width=32),
    st.floats(16, 64, width=32),
    st.floats(0.5, 4, width=32),
)
def test_positions_are_rotated_as_llama_cpp_rotates_them(
    kind: str, factor: float, theta: float, original: int, attention: float, fast: float, slow: float
) -> None:
    written: dict[str, Any] = {
        "rope.freq_base": theta,
        "context_length": 512,
        "block_count": 2,
        "embedding_length": 64,
        "attention.head_count": 4,
    }
    factors = llama3_factors(theta, 16, factor, original) if kind == "llama3" else None
    if factors is not None:
        assume(factors[-1] == np.float32(factor))  # published models have frequencies that are divided by all of it
    if kind != "llama3":
        written |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "yarn":
        written |= {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": attention}
        written |= {"rope.scaling.yarn_beta_fast": fast, "rope.scaling.yarn_beta_slow": slow}
        if factor == 1:
            written["rope.scaling.attn_factor"] = 1.0
    values = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in written.items()}
    config = tiny_config("llama")
    config = apply_settings(
        config, Metadata("a.gguf", values, frozenset(), {} if factors is None else {"rope_freqs.weight": factors})
    )
    cosine, sine = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[37]]))
    angles, scale = ggml_angles(written, factors, 37)
    np.testing.assert_allclose(cosine[0, 0, :8].numpy(), scale * np.cos(angles), atol=2e-4)
    np.testing.assert_allclose(sine[0, 0, :8].numpy(), scale * np.sin(angles), atol=2e-4)


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

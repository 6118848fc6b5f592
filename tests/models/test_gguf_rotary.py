"""The rotary embeddings of GGUF files: positions are rotated as llama.cpp rotates them, or the file is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from medusa_export.models.gguf.metadata import Metadata
from medusa_export.models.gguf.settings import apply_settings
from medusa_export.models.supported import short_positions
from support.gguf_files import PROMPT, VOCAB, assert_same, load, refusal, write_gguf
from support.tiny_models import tiny_config, tiny_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


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
    """The factors of frequencies that llama.cpp's converter writes for Llama 3.1's scaling."""
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


def test_factors_of_short_requests_alone_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=VOCAB)
    factors = longrope_factors()
    del factors["rope_factors_long.weight"]
    assert "by LongRoPE, but lacks" in refusal(write_gguf(tmp_path / "tiny.gguf", model, tensors=factors))


def test_longrope_besides_another_scaling_is_refused(tmp_path: Path) -> None:
    model = tiny_model("phi3", vocab_size=VOCAB, partial_rotary_factor=1.0, **LONGROPE)
    keys = {**LONGROPE_KEYS, "rope.scaling.factor": 2.0}
    assert "twice" in refusal(write_gguf(tmp_path / "tiny.gguf", model, keys, tensors=longrope_factors()))


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


@settings(max_examples=150)
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

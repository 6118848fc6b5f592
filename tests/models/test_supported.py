"""Models that the step can't honour are refused by the name of what they need."""

from __future__ import annotations

import re

import pytest
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

from medusa_export.common.errors import ExportError, ModelNotSupportedError
from medusa_export.compat.transformers import using_attention
from medusa_export.models.supported import check_supported
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.states import observed_states
from support.tiny_models import FORMS, REFUSED_FAMILIES, SUPPORTED_FAMILIES, tiny_model

FEATURES = {
    "t5": "encoder",
    "bart": "encoder",
    "mamba": "recurrent",
    "jamba": "recurrent",
    "lfm2": "convolution",
    "qwen3_next": "linear-attention",
    "gemma3_bidirectional": "not causal",
}


@pytest.mark.parametrize("family", [*SUPPORTED_FAMILIES, *FORMS])
def test_supported_families_pass(family: str) -> None:
    check_supported(tiny_model(family))


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_refused_families_are_named(family: str) -> None:
    with pytest.raises(ModelNotSupportedError, match=re.escape(FEATURES[family])) as refusal:
        check_supported(tiny_model(family))
    assert FEATURES[family] in refusal.value.feature
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["full_attention", "compressed_sparse_attention"]}, "'compressed_sparse_attention'"),
        ({"is_causal": False}, "not causal"),
        ({"attention_chunk_size": 8}, "chunked"),
        ({"position_embedding_type": "relative_key"}, "relative position"),
    ],
)
def test_a_setting_is_enough(change: dict[str, object], words: str) -> None:
    model = tiny_model("llama")
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelNotSupportedError, match=words):
        check_supported(model)


def test_families_that_compute_attention_by_themselves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda _: False))
    with pytest.raises(ModelNotSupportedError, match=r"attention interface.*need an adapter"):
        check_supported(model)


def test_a_model_that_fails_on_shapes_is_an_export_error() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Expected inputs of BF16 type.\nAnd so on.")

    model = tiny_model("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ExportError, match=r"Llama.* can't be run on shapes: RuntimeError: Expected .* type\.$"):
        observed_states(model, 0)


def test_no_output_embeddings() -> None:
    with pytest.raises(ModelNotSupportedError, match="output embeddings"):
        check_supported(tiny_model("llama").model)


def test_stateful_layers_are_seen_without_layer_types() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mixer = type("TinyMambaMixer", (nn.Module,), {})()
    with pytest.raises(ModelNotSupportedError, match="recurrent"):
        check_supported(model)


def test_layer_types_outweigh_the_class_of_a_hybrid() -> None:
    """Some checkpoints of hybrid architectures hold attention layers alone."""
    model = tiny_model("llama")
    type(model)._is_stateful, before = True, type(model)._is_stateful
    try:
        model.config.layer_types = ["full_attention"] * 2
        check_supported(model)
        model.config.layer_types = None
        with pytest.raises(ModelNotSupportedError, match="recurrent"):
            check_supported(model)
    finally:
        type(model)._is_stateful = before


def test_a_multimodal_wrapper_is_refused() -> None:
    text = tiny_model("gemma3_text").config
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    with pytest.raises(ModelNotSupportedError, match="several models in one"):
        check_supported(model)


@pytest.mark.parametrize("family", [*SUPPORTED_FAMILIES, *FORMS])
def test_layers_attend_under_the_masks_that_the_model_makes(family: str) -> None:
    model = tiny_model(family)
    with using_attention(model, ATTENTION_NAME):
        assert observed_states(model, 0)


def test_a_window_that_only_the_mask_has_is_refused() -> None:
    """Phi-MoE's layers attend under the mask that they are given, and don't say that it has a window."""
    whole, narrow = tiny_model("phimoe", sliding_window=512), tiny_model("phimoe", sliding_window=8)
    for model in (whole, narrow):
        model.set_attn_implementation(ATTENTION_NAME)
    assert observed_states(whole, 0)  # the window is as long as the context
    with pytest.raises(ModelNotSupportedError, match="a window of 8 tokens in layer 0"):
        observed_states(narrow, 0)

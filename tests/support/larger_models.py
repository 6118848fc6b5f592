"""Random models for images and text that are small enough for tests. Their text models are those of ``tiny_models``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from medusa_export.compat.transformers import model_class
from support.tiny_models import COMMON, form_settings, randomize

_TEXT: dict[str, Any] = {**COMMON, "num_hidden_layers": 3}
del _TEXT["tie_word_embeddings"]  # the larger configuration says it
_SIGLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 14,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_IMAGE = {"image_token_id": 98}

_LARGER: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 8, "layer_types": _SLIDING, "query_pre_attn_scalar": 24},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": False,
        "image_token_index": 98,
        "boi_token_index": 97,
        "eoi_token_index": 96,
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 1},
        "tie_word_embeddings": False,
        **_IMAGE,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
        "tie_word_embeddings": False,
        **_IMAGE,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": True,
        **_IMAGE,
    },
    "qwen3_vl_moe": {
        "text_config": {
            **_TEXT,
            "rope_parameters": {**_MROPE, "mrope_interleaved": True},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [],
        },
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": False,
        **_IMAGE,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": 8},
        "vision_config": {**_SIGLIP, "model_type": "pixtral", "head_dim": 8},
        "tie_word_embeddings": False,
        "image_token_index": 98,
    },
    "smolvlm": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _SIGLIP,
        "scale_factor": 1,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        **_IMAGE,
    },
    "gemma4": {
        "text_config": {
            **_TEXT,
            **form_settings("gemma4"),
            "pad_token_id": 0,
            "final_logit_softcapping": 3.0,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": {**_SIGLIP, "num_key_value_heads": 2, "head_dim": 8},
        "tie_word_embeddings": False,
        # The larger model takes other embeddings for these tokens. So the text model must not emit them.
        "image_token_id": 150,
        "video_token_id": 151,
        "audio_token_id": 152,
    },
    "llama4": {
        "text_config": {**_TEXT, **form_settings("llama4_dense")},
        "vision_config": {
            **_SIGLIP,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        "tie_word_embeddings": False,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_SIGLIP, "model_type": "siglip_vision_model"},
        "image_token_index": 98,
        "tie_word_embeddings": False,
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _SIGLIP,
        "scale_factor": 1,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        **_IMAGE,
    },
}
LARGER = [
    pytest.param(name, marks=() if name == "qwen2_5_vl" else pytest.mark.slow, id=name) for name in sorted(_LARGER)
]


def larger_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model for images and text in fp32, by its model type."""
    config = AutoConfig.for_model(name, **_LARGER[name])
    build: Any = model_class(config)
    torch.manual_seed(seed)
    model: PreTrainedModel = build(config)
    randomize(model, seed)
    model.generation_config.eos_token_id = None
    return model.eval()

"""Random models for images and text that are small enough for tests. Their text models are those of ``tiny_models``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from medusa_export.compat.transformers import model_class
from support.tiny_models import COMMON, form_settings, randomize

_TEXT: dict[str, Any] = {**COMMON, "num_hidden_layers": 3}
del _TEXT["tie_word_embeddings"]  # the larger model's configuration sets it
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
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": _SIGLIP,
        "tie_word_embeddings": False,
    },
    "aya_vision": {
        "text_config": {**_TEXT, "model_type": "cohere2"},
        "vision_config": {**_SIGLIP, "model_type": "siglip_vision_model"},
        "tie_word_embeddings": False,
    },
    "glm4v_moe": {
        "text_config": {
            **_TEXT,
            "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        "vision_config": {**_QWEN_VISION, "image_size": 28, "out_hidden_size": 64},
        "tie_word_embeddings": False,
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            **_TEXT,
            "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [32, 32],
            "moe_num_experts": 4,
            "moe_k": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        "vision_config": {**_QWEN_VISION, "in_channels": 3},
        "tie_word_embeddings": False,
    },
    "step3p7": {
        "text_config": {
            **_TEXT,
            "pad_token_id": 0,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "sliding_window": 8,
            "swiglu_limits": [0.0, 1.0, 0.5],
            "swiglu_limits_shared": [0.0, 0.0, 0.0],
        },
        "vision_config": _SIGLIP,
        "tie_word_embeddings": False,
    },
    "granite_docling": {
        "text_config": {**_TEXT, "logits_scaling": 6.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
        "vision_config": {**_SIGLIP, "out_hidden_size": 64},
        "tie_word_embeddings": False,
    },
}
# The part of Qwen Omni that answers with text.
_OMNI: dict[str, Any] = {
    "text_config": {**_TEXT, "rope_parameters": _MROPE},
    "vision_config": {**_QWEN_VISION, "out_hidden_size": 64},
    "audio_config": {
        "d_model": 16,
        "encoder_ffn_dim": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "output_dim": 64,
        "num_mel_bins": 16,
    },
    "vision_start_token_id": 97,
    "image_token_index": 150,
    "video_token_index": 151,
    "audio_token_index": 152,
}
LARGER = [
    pytest.param(name, marks=() if name == "qwen2_5_vl" else pytest.mark.slow, id=name) for name in sorted(_LARGER)
]


def larger_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model for images and text in fp32, by its model type."""
    return _random(AutoConfig.for_model(name, **_LARGER[name]), seed)


def omni_model(seed: int = 0) -> PreTrainedModel:
    """A random Qwen2.5-Omni without a voice. Its module ``thinker`` answers with text."""
    thinker = AutoConfig.for_model("qwen2_5_omni_thinker", **_OMNI).to_dict()
    model = _random(AutoConfig.for_model("qwen2_5_omni", thinker_config=thinker, enable_audio_output=False), seed)
    model.thinker.generation_config.eos_token_id = None
    return model


def _random(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    build: Any = model_class(config)
    torch.manual_seed(seed)
    model: PreTrainedModel = build(config)
    randomize(model, seed)
    model.generation_config.eos_token_id = None
    return model.eval()

"""Random models of real architectures that are small enough for tests: a few layers, 64 channels, 101 tokens.

All parameters are drawn from a seed. They are large enough that attention, windows, caps, biases and norms all change
the result. So a step with an error in one of them chooses other tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from support.attention_forms import FORM_SETTINGS, SLIDING_WINDOW, VOCAB_SIZE

# Sizes of all tiny models.
COMMON: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}

# The special features of each supported family, switched on.
_SUPPORTED: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": SLIDING_WINDOW},
    "qwen2": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": SLIDING_WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {
        "num_hidden_layers": 3,
        "sliding_window": SLIDING_WINDOW,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 24,
    },
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
    },
    "phi3": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "starcoder2": {"sliding_window": SLIDING_WINDOW},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {
        "num_hidden_layers": 3,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "logit_scale": 0.25,
    },
    "gpt2": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": SLIDING_WINDOW},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "clip_qkv": 2.0},
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "glm4_moe": {
        "num_hidden_layers": 3,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
    },
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}

FORMS = tuple(FORM_SETTINGS)

# Families that must be refused: model type and special features of each.
_REFUSED: dict[str, tuple[str, dict[str, object]]] = {
    "t5": ("t5", {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
    "bart": (
        "bart",
        {
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "decoder_start_token_id": 0,
        },
    ),
    "mamba": ("mamba", {"state_size": 8, "expand": 2, "num_hidden_layers": 2}),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": (
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "gemma3_bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
}

SUPPORTED_FAMILIES = tuple(_SUPPORTED)
# With other seeds these models repeat one token.
SEEDS = {"qwen3": 3, "olmo2": 3, "minicpm3": 1, "bloom": 4, "mpt": 2, "falcon_alibi": 3, "codegen": 1}


def families(*first: str, others: tuple[str, ...]) -> list[Any]:
    """Parameters of a test: ``first`` as they are, ``others`` marked as slow, since they are many."""
    return [*first, *(pytest.param(name, marks=pytest.mark.slow) for name in others if name not in first)]


REFUSED_FAMILIES = tuple(_REFUSED)


def tiny_config(family: str, **overrides: object) -> PreTrainedConfig:
    """A small configuration of a family, with its special features. ``overrides`` take precedence."""
    model_type, special = (_REFUSED | FORM_SETTINGS).get(family) or (family, _SUPPORTED[family])
    settings = {**COMMON, **special}
    if model_type in ("mpt", "mamba", "bloom"):  # they have other names for these; some are read-only aliases
        for name in ("num_key_value_heads", "head_dim", "num_attention_heads", "intermediate_size"):
            settings.pop(name)
    if model_type == "gpt2":
        settings["n_inner"] = settings.pop("intermediate_size")
        for name in ("num_key_value_heads", "head_dim"):
            settings.pop(name)
    if model_type == "mpt":
        for name in ("hidden_size", "num_hidden_layers", "max_position_embeddings"):
            settings.pop(name)
    if model_type in ("t5", "bart"):
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
            settings.pop(name)
        settings.update(pad_token_id=0, eos_token_id=1, bos_token_id=0)
    if model_type in ("deepseek_v2", "deepseek_v3", "minicpm3", "falcon", "jetmoe", "opt"):
        settings.pop("head_dim")
    if model_type == "opt":
        for name in ("num_key_value_heads", "intermediate_size"):
            settings.pop(name)
    return AutoConfig.for_model(model_type, **{**settings, **overrides})


def form_settings(form: str) -> dict[str, object]:
    """The model type and the special features of one of ``FORMS``."""
    kind, features = FORM_SETTINGS[form]
    return {"model_type": kind, **features}


def randomize(model: torch.nn.Module, seed: int, std: float = 0.25) -> None:
    """Draws all parameters: matrices from N(0, std²). To vectors (norms, biases) it adds noise from N(0, 0.1²)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim >= 2:
                parameter.copy_(std * noise)
            else:
                parameter.add_(0.1 * noise)


def tiny_model(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random fp32 model of a family, in eval mode and without gradients. The same seed gives the same model."""
    config = tiny_config(family, **overrides)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    if model.can_generate():
        model.generation_config.eos_token_id = None
    model.eval().requires_grad_(False)
    return model

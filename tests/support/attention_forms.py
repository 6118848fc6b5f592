"""Settings of tiny models whose attention has forms that most families don't have."""

from __future__ import annotations

VOCAB_SIZE = 101
SLIDING_WINDOW = 8

LATENT: dict[str, object] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}

# Model type and special features of each.
FORM_SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "gemma3n": (
        "gemma3n_text",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "laurel_rank": 4,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
    ),
    "gemma4_keys_as_values": (
        "gemma4_text",
        {
            "num_kv_shared_layers": 0,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "n_group": 4, "topk_group": 2}),
    "minicpm3": ("minicpm3", {name: size for name, size in LATENT.items() if "lora" in name or "head" in name}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_hidden_layers": 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "granite_swa": (  # sinks, also in layers whose queries are not rotated
        "granite_swa",
        {
            "num_hidden_layers": 3,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "layer_rope_theta": [10000.0, 0.0, 100.0],
            "attention_multiplier": 0.25,
        },
    ),
    "llama4_dense": (
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "attention_chunk_size": SLIDING_WINDOW,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "moe_layers": [],
            "layer_types": ["chunked_attention", "chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 1, 0, 1],
            "floor_scale": 4,
            "attn_scale": 0.5,
        },
    ),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt_projected": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 6, "hidden_size": 48}),
    "mpt": ("mpt", {"d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 512}),
    "falcon": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "alibi": False}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon_alibi": (
        "falcon",
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "new_decoder_architecture": False,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
        },
    ),
    "gptj": ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": 96}),
    "gpt_neo": (
        "gpt_neo",
        {
            "num_hidden_layers": 3,
            "num_heads": 4,
            "attention_types": [[["local", "global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "codegen": ("codegen", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_inner": 96}),
    "llama4": (
        "llama4_text",
        {
            "num_hidden_layers": 3,
            "attention_chunk_size": SLIDING_WINDOW,
            "intermediate_size_mlp": 96,
            "intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_layers": [0, 2],
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0, 1],
        },
    ),
    "dbrx": (
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
    ),
    "jetmoe": (
        "jetmoe",
        {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    ),
    "llama_dynamic_rope": (
        "llama",
        {
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "gemma3_dynamic_rope": (
        "gemma3_text",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            },
        },
    ),
    "phi3_longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 128,
                "short_factor": [1.0, 1.5] * 4,
                "long_factor": [2.0, 3.0] * 4,
            },
        },
    ),
}

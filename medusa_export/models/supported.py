"""Refuse models that a decoding step can't honour.

It honours models whose layers are causal attention over one kind of K/V cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from medusa_export.common.errors import ExportError, ModelNotSupportedError
from medusa_export.compat.transformers import calls_attention_interface, calls_experts_interface, has_state

_SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

# Kinds of layers in `config.layer_types`, in words. A message names the first that a model has.
_LAYER_TYPES_IN_WORDS = {
    "linear_attention": "state-space, recurrent or linear-attention layers",
    "hybrid": "layers that mix attention with a recurrent state",
    "hybrid_sliding": "layers that mix attention with a recurrent state",
    "conv": "short-convolution layers",
    "chunked_attention": "chunked attention",
    "indexed_attention": "sparse attention over indexed entries",
}

# Class names of layers that keep a state, for models without `config.layer_types`.
_STATEFUL_LAYER = re.compile(r"mamba|rwkv|[ms]lstm|recurrent(block|layer)|rglru|shortconv|deltanet|lightning")

_EXPERTS = re.compile(r"experts$")

# Parts of a configuration that hold settings, not another model.
_PLAIN_SUB_CONFIGS = frozenset({"attn_config", "ffn_config"})

# Features that only the model's type shows.
_NAMED_FEATURES = {"doge": "an attention mask of its own making"}


def check_supported(model: PreTrainedModel) -> None:
    """Refuses a model for which a step would be wrong.

    Raises:
        ModelNotSupportedError: The message names the feature.
    """
    for find in _CHECKS:
        feature = find(model)
        if feature is not None:
            raise ModelNotSupportedError(feature)


def max_positions(model: PreTrainedModel) -> int:
    """The length of the longest sequence that a model takes, in tokens.

    Raises:
        ExportError: The model's configuration does not say.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise ExportError("The model's config has no max_position_embeddings: add it to config.json.")
    return positions


def _composition(model: PreTrainedModel) -> str | None:
    config = model.config
    if config.is_encoder_decoder:
        return "an encoder besides its decoder"
    if any(_last(name) in ("encoder_attn", "crossattention", "cross_attn") for name, _ in model.named_modules()):
        return "cross-attention"
    if set(config.sub_configs) - _PLAIN_SUB_CONFIGS:
        return f"several models in one ({type(model).__name__}), of which the text model has to be exported by itself"
    if model.get_output_embeddings() is None:
        return "no output embeddings"
    quantizer = getattr(model, "hf_quantizer", None)
    return None if quantizer is None else f"weights packed by {quantizer.quantization_config.quant_method.value}"


def _layer_kinds(model: PreTrainedModel) -> str | None:
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        refused = set(kinds) - _SERVED_LAYER_TYPES
        known = next((words for kind, words in _LAYER_TYPES_IN_WORDS.items() if kind in refused), None)
        return known or (f"layers of the kind {min(refused)!r}" if refused else None)
    if has_state(model) or any(_STATEFUL_LAYER.search(type(module).__name__.lower()) for module in model.modules()):
        return _LAYER_TYPES_IN_WORDS["linear_attention"]
    return _LAYER_TYPES_IN_WORDS["chunked_attention"] if getattr(model.config, "attention_chunk_size", None) else None


def _sinks(model: PreTrainedModel) -> str | None:
    found = any("sink" in _last(name) for name, _ in model.named_parameters())
    return "attention sinks" if found else None


def _positions(model: PreTrainedModel) -> str | None:
    config = model.config
    builders = ("build_alibi_tensor", "build_mpt_alibi_tensor")
    if getattr(config, "alibi", False) or any(hasattr(model.base_model, name) for name in builders):
        return "ALiBi position biases"
    relative = str(getattr(config, "position_embedding_type", "")).startswith("relative")
    if relative or any(_last(name) == "relative_attention_bias" for name, _ in model.named_modules()):
        return "relative position biases"
    for kind in _rope_types(config):
        if "dynamic" in kind or kind == "longrope":
            return f"rotary embeddings that change with the length of the sequence ({kind!r})"
    return None


def _rope_types(config: PreTrainedConfig) -> Iterator[str]:
    """The kinds of rotary embedding: one for the model, or one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for part in (parameters, *parameters.values()):
        if isinstance(part, dict) and isinstance(part.get("rope_type"), str):
            yield part["rope_type"]


def _caches(model: PreTrainedModel) -> str | None:
    if getattr(model.config, "num_kv_shared_layers", None):
        return "layers that share another layer's keys and values"
    if any(getattr(module, "is_kv_shared_layer", False) for module in model.modules()):
        return "layers that share another layer's keys and values"
    if getattr(model.config, "kv_lora_rank", None):
        return "multi-head latent attention"
    sizes = {
        module.out_features
        for name, module in model.named_modules()
        if _last(name) in ("k_proj", "v_proj") and isinstance(module, nn.Linear)
    }
    return "keys and values of more than one size" if len(sizes) > 1 else None


def _experts(model: PreTrainedModel) -> str | None:
    for module in model.modules():
        if _EXPERTS.search(type(module).__name__.lower()) and not calls_experts_interface(module):
            return f"experts ({type(module).__name__}) that don't go through transformers' experts interface"
    return None


def _attention(model: PreTrainedModel) -> str | None:
    if getattr(model.config, "use_bidirectional_attention", None) or getattr(model.config, "is_causal", True) is False:
        return "attention that is not causal"
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        return "attention that is not causal"
    if not calls_attention_interface(model):
        return "attention layers that don't go through transformers' attention interface"
    return _NAMED_FEATURES.get(model.config.model_type)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


# Each returns the name of a feature that a step can't honour, or None.
_CHECKS: tuple[Callable[[PreTrainedModel], str | None], ...] = (
    _composition,
    _layer_kinds,
    _sinks,
    _positions,
    _caches,
    _experts,
    _attention,
)

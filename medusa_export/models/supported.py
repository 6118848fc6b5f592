"""Refuse models that a decoding step can't honour.

It honours models whose layers are causal attention over caches with one entry per token. What such caches hold is
observed (``step.states``), not checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from medusa_export.common.errors import ExportError, ModelNotSupportedError
from medusa_export.compat.transformers import calls_attention_interface, calls_experts_interface, has_state, is_larger

_SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

# Families whose attention doesn't call transformers' interface, but has an adapter (``step.adapters``).
_ADAPTED = frozenset({"bloom", "mpt", "falcon", "gptj", "gpt_neo", "codegen"})
# Classes of experts that don't call transformers' interface, but have an adapter (``step.adapters.experts``).
_ADAPTED_EXPERTS = frozenset({"DbrxExperts", "Step3p7Experts", "Llama4TextExperts", "JetMoeParallelExperts"})
# The length that models with ALiBi are exported for where their configuration gives none.
_ALIBI_POSITIONS = 2048
# Classes of rotary embeddings that look at the length in code of their own, too.
_OWN_LENGTHS = frozenset({"PhimoeRotaryEmbedding"})
# Names that configurations have for the longest sequence.
_POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")

# Kinds of layers in `config.layer_types`, in words. A message names the first that a model has.
_LAYER_TYPES_IN_WORDS = {
    "linear_attention": "state-space, recurrent or linear-attention layers",
    "hybrid": "layers that mix attention with a recurrent state",
    "hybrid_sliding": "layers that mix attention with a recurrent state",
    "conv": "short-convolution layers",
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


def several_models(name: str) -> str:
    """The words for a larger model, such as one for images and text.

    Args:
        name: The name of its class.
    """
    return f"several models in one ({name}; export its text model with `text_only=True`)"


def max_positions(model: PreTrainedModel) -> int:
    """The length of the longest sequence that a model takes, in tokens.

    For rotary embeddings that depend on the length (``dynamic``, and ``longrope`` of a kind that ``short_positions``
    does not know) it is the original length, up to which they are the same for all sequences. Beyond it transformers
    computes a sequence with other frequencies than before.

    Raises:
        ExportError: The model's configuration does not say.
    """
    config = model.config.get_text_config()
    found = next((size for name in _POSITIONS if isinstance(size := getattr(config, name, None), int)), None)
    if found is None and config.model_type in _ADAPTED:
        found = _ALIBI_POSITIONS
    if found is None:
        raise ExportError("The model's config has no max_position_embeddings: add it to config.json.")
    if short_positions(model) is not None:
        return found
    for parameters in _ropes(config):
        if is_length_dependent(parameters["rope_type"]):
            found = min(found, _original_length(config, parameters) or found)
    return found


def short_positions(model: PreTrainedModel) -> int | None:
    """The longest prompt, in tokens, with the first of a model's two sets of rotary frequencies (``longrope``).

    transformers computes all of a longer sequence with the second set. None if the model has one set.
    """
    config = model.config.get_text_config()
    kinds = [
        (type(module).__name__, module.rope_type)
        for module in model.modules()
        if is_length_dependent(getattr(module, "rope_type", None))
    ]
    if not kinds or any(kind != "longrope" or name in _OWN_LENGTHS for name, kind in kinds):
        return None
    return _original_length(config, config.rope_parameters)


def _original_length(config: PreTrainedConfig, parameters: Mapping[str, Any]) -> int | None:
    found: int | None = parameters.get("original_max_position_embeddings")
    return found or getattr(config, "original_max_position_embeddings", None)


def is_length_dependent(rope_type: object) -> bool:
    """True if a kind of rotary embedding, or one of several by kind of layer, depends on the length of a sequence."""
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)


def _composition(model: PreTrainedModel) -> str | None:
    config = model.config
    if config.is_encoder_decoder:
        return "an encoder besides its decoder"
    if any(_last(name) in ("encoder_attn", "crossattention", "cross_attn") for name, _ in model.named_modules()):
        return "cross-attention"
    if set(config.sub_configs) - _PLAIN_SUB_CONFIGS:
        name = type(model).__name__
        mixed = (
            f"several models in one ({name}), whose text model has no configuration of its own and can't be taken out"
        )
        return several_models(name) if is_larger(config) else mixed
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
    if getattr(model.config, "attention_chunk_size", None):
        return "chunked attention in layers that config.layer_types does not name"
    return None


def _positions(model: PreTrainedModel) -> str | None:
    config = model.config
    builders = ("build_alibi_tensor", "build_mpt_alibi_tensor")
    has_alibi = getattr(config, "alibi", False) or any(hasattr(model.base_model, name) for name in builders)
    if has_alibi and config.model_type not in _ADAPTED:
        return f"ALiBi position biases without an adapter for {config.model_type!r}"
    relative = str(getattr(config, "position_embedding_type", "")).startswith("relative")
    if relative or any(_last(name) == "relative_attention_bias" for name, _ in model.named_modules()):
        return "relative position biases"
    return None


def _ropes(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The parameters of rotary embeddings: of one for the model, or of one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for part in (parameters, *parameters.values()):
        if isinstance(part, dict) and isinstance(part.get("rope_type"), str):
            yield part


def _experts(model: PreTrainedModel) -> str | None:
    for module in model.modules():
        name = type(module).__name__
        served = name in _ADAPTED_EXPERTS or calls_experts_interface(module)
        if _EXPERTS.search(name.lower()) and not served:
            return (
                f"experts ({name}) that don't go through transformers' experts interface (they would need an adapter "
                "in medusa_export/step/adapters/experts.py)"
            )
    return None


def _attention(model: PreTrainedModel) -> str | None:
    # "vision": over images only, so text stays causal
    bidirectional = getattr(model.config, "use_bidirectional_attention", None)
    if bidirectional not in (None, False, "vision") or getattr(model.config, "is_causal", True) is False:
        return "attention that is not causal"
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        return "attention that is not causal"
    if not calls_attention_interface(model) and model.config.model_type not in _ADAPTED:
        return (
            "attention layers that don't go through transformers' attention interface (they would need an adapter in "
            "medusa_export/step/adapters/attention.py)"
        )
    return _NAMED_FEATURES.get(model.config.model_type)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


# Each returns the name of a feature that a step can't honour, or None.
_CHECKS: tuple[Callable[[PreTrainedModel], str | None], ...] = (
    _composition,
    _layer_kinds,
    _positions,
    _experts,
    _attention,
)

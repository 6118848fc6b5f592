"""Turn a GGUF file's metadata into settings of transformers' configuration.

transformers reads the sizes of a model from the metadata and ignores much else: the scaling of positions, the part of a
head that is rotated, caps on logits, windows, the tokens that end a turn. This module reads every key of a supported
architecture, knows that it changes nothing, or refuses it by name:

* ``Architecture.direct``: the value is that of a setting;
* ``ROTARY_KEYS``, ``_END_TOKENS`` and ``Architecture.own``: this module has a rule, after llama.cpp's;
* ``_HARMLESS``: the key does not change the result;
* ``_NEUTRAL``: the key is accepted with a value that switches its feature off;
* any other key under the architecture's name is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from medusa_export.common.errors import CheckpointError
from medusa_export.models.gguf.metadata import Metadata
from medusa_export.models.gguf.rotary import ROTARY_KEYS, apply_rotary

_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_REQUIRED = ("context_length", "block_count", "embedding_length", "attention.head_count")

_HARMLESS = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})
# Values that switch a feature off, by key.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
# Tokens at which llama.cpp stops: the ends of a text, of a turn, and of a message that calls a tool.
_END_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_OTHER_TOKENS = {"bos_token_id": "tokenizer.ggml.bos_token_id", "pad_token_id": "tokenizer.ggml.padding_token_id"}


@dataclass(frozen=True)
class Architecture:
    """The rules for metadata and tensors of one of llama.cpp's architectures.

    Attributes:
        direct: The name of the setting that has the value of a key, by key.
        rotary: True if the model has rotary embeddings.
        rotary_part: True if they may rotate a part of each head only.
        own: Keys that have a rule in this module.
        interleaved: True if the rows of q and k alternate between the two halves of each head.
        norm_offset: The number that llama.cpp adds to the weights of norms.
        transposed: Names of weights that are stored transposed.
    """

    direct: Mapping[str, str]
    rotary: bool = True
    rotary_part: bool = False
    own: frozenset[str] = frozenset()
    interleaved: bool = False
    norm_offset: int = 0
    transposed: tuple[str, ...] = ()


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_SIZES | _RMS, interleaved=True),
    "qwen2": Architecture(_SIZES | _RMS),
    "qwen3": Architecture(_SIZES | _RMS),
    "phi3": Architecture(_SIZES | _RMS | _WINDOW, rotary_part=True),
    "gemma2": Architecture(
        _SIZES
        | _RMS
        | _WINDOW
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        norm_offset=1,
    ),
    "gemma3": Architecture(
        _SIZES | _RMS | _WINDOW | {"final_logit_softcapping": "final_logit_softcapping"},
        own=frozenset({"rope.freq_base_swa", "attention.sliding_window_pattern"}),
        norm_offset=1,
    ),
    "starcoder2": Architecture(_SIZES | {"attention.layer_norm_epsilon": "norm_epsilon"}),
    "gpt2": Architecture(
        {
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        rotary=False,
        transposed=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
    ),
}


def check_readable(metadata: Metadata) -> None:
    """Refuses a file that holds no model, a part of one, or a model of an architecture without rules here.

    Raises:
        CheckpointError: The message says which.
    """
    kind = metadata.values.get("general.type", "model")
    if kind != "model":
        adapter = " Merge it into its base model first." if kind == "adapter" else ""
        raise CheckpointError(f"The GGUF file {metadata.source} holds no model, but is of the type {kind!r}.{adapter}")
    parts = metadata.values.get("split.count", 1)
    if parts > 1:
        raise CheckpointError(
            f"The GGUF file {metadata.source} is one of {parts} parts: join them first, with llama-gguf-split --merge."
        )
    if metadata.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise metadata.error(f"is of the architecture {metadata.architecture!r}; those that can be read are {known}")
    for key in (*ARCHITECTURES[metadata.architecture].direct, *ROTARY_KEYS):
        value = metadata.get(key)
        if isinstance(value, list):
            raise metadata.error(f"has a {metadata.architecture}.{key} for each layer: {_short(value)}")


def apply_settings(config: PreTrainedConfig, metadata: Metadata) -> PreTrainedConfig:
    """Completes a configuration that transformers made from a GGUF file.

    Returns:
        The configuration, changed in place, or another one that replaces it.

    Raises:
        CheckpointError: A key of the metadata has a meaning that can't be kept. The message names it.
        ModelNotSupportedError: The model needs something that a step can't honour.
    """
    architecture = ARCHITECTURES[metadata.architecture]
    _check_keys(metadata, architecture)
    if config.model_type == "mistral":  # transformers' choice by the name of the model; its layers are a llama's
        config = LlamaConfig.from_dict({**config.to_dict(), "model_type": "llama"})
    for key in _REQUIRED:
        if metadata.get(key) is None:
            raise metadata.error(f"lacks {metadata.architecture}.{key}")
    for key, setting in architecture.direct.items():
        value = metadata.get(key)
        if value is not None:
            setattr(config, setting, value)
    if "attention.head_count_kv" in architecture.direct and metadata.get("attention.head_count_kv") is None:
        config.num_key_value_heads = metadata.get("attention.head_count")
    for setting, tensor in _BIASES.items():
        if hasattr(config, setting):
            setattr(config, setting, tensor in metadata.tensors)
    if architecture.rotary:
        apply_rotary(config, metadata, may_rotate_part=architecture.rotary_part)
    special = _SPECIAL.get(metadata.architecture)
    if special is not None:
        special(config, metadata)
    _apply_end_tokens(config, metadata)
    for setting, key in _OTHER_TOKENS.items():
        token = metadata.values.get(key)
        setattr(config, setting, token if token is not None and 0 <= token < config.vocab_size else None)
    return config


# Settings for biases, and a tensor that the file has if the layers have biases.
_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias", "use_bias": "blk.0.attn_q.bias"}


def _check_keys(metadata: Metadata, architecture: Architecture) -> None:
    prefix = f"{metadata.architecture}."
    rotary = ROTARY_KEYS if architecture.rotary else frozenset()
    known = {*architecture.direct, *architecture.own, *rotary, *_HARMLESS}
    for key, value in metadata.values.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in known or metadata.get(name) in _NEUTRAL.get(name, ()):
            continue
        if name == "attention.sliding_window" and not 0 < value < metadata.get("context_length", 0):
            continue
        raise metadata.error(f"says {key} = {_short(value)}, which is a setting that can't be kept here")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _gemma2(config: Any, metadata: Metadata) -> None:
    _gemma_scale(config, metadata, layers_of_27b=46)


def _gemma3(config: Any, metadata: Metadata) -> None:
    _gemma_scale(config, metadata, layers_of_27b=62)
    full = config.rope_parameters
    if full["rope_type"] not in ("default", "linear"):
        raise metadata.error(f"scales positions by {full['rope_type']}, which gemma3 has not")
    local = float(metadata.get("rope.freq_base_swa", 10000.0))
    config.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
        "full_attention": full,
    }
    pattern = metadata.values.get("gemma3.attention.sliding_window_pattern", 6)
    layers = config.num_hidden_layers
    if not metadata.get("attention.sliding_window"):
        slides = [False] * layers
    elif isinstance(pattern, list):
        slides = [bool(entry) for entry in pattern]
    else:
        slides = [pattern > 0 and (layer + 1) % pattern != 0 for layer in range(layers)]
    if len(slides) != layers:
        raise metadata.error(f"says of {len(slides)} layers whether they slide, and has {layers}")
    config.layer_types = ["sliding_attention" if slide else "full_attention" for slide in slides]


def _gemma_scale(config: Any, metadata: Metadata, *, layers_of_27b: int) -> None:
    """Sets the scale of attention, which no key holds. llama.cpp recognizes the one size that differs by its layers."""
    if config.num_hidden_layers == layers_of_27b:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    else:
        config.query_pre_attn_scalar = config.head_dim


_SPECIAL: Mapping[str, Callable[[Any, Metadata], None]] = {"gemma2": _gemma2, "gemma3": _gemma3}


def _apply_end_tokens(config: Any, metadata: Metadata) -> None:
    named = [metadata.values.get(key) for key in _END_TOKENS]
    if named[0] is None and metadata.values.get("tokenizer.ggml.model") == "llama":
        named[0] = 2  # llama.cpp's for a vocabulary of SentencePiece
    # Some files say that there is no such token by an id outside the vocabulary.
    found = list(dict.fromkeys(token for token in named if token is not None and 0 <= token < config.vocab_size))
    config.eos_token_id = found[0] if len(found) == 1 else found or None

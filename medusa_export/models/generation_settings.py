"""A model's generation config: the settings that a bundle keeps, and those that decoding does not apply."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

# Settings that a request can ask for. Without them decoding is greedy.
SAMPLING = frozenset({"do_sample", "temperature", "top_k", "top_p", "min_p"})
# Settings that change no token of an answer, or that each call gives.
_NO_EFFECT = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "eos_token_id",  # applied
        "is_assistant",
        "low_memory",
        "max_cache_len",
        "max_length",
        "max_matching_ngram_size",
        "max_new_tokens",
        "max_time",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
        "use_mtp",
    }
)
# Values that do not change decoding. transformers fills in defaults only when it generates.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "diversity_penalty": (0.0,),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "length_penalty": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0.0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "repetition_penalty": (1.0,),
    "token_healing": (False,),
    "top_h": (1.0,),
    "typical_p": (1.0,),
}


def kept_settings(generation: GenerationConfig | None) -> dict[str, Any]:
    """The settings of a generation config that have a value, as plain JSON.

    Values that JSON lacks, such as infinities, become text.
    """
    if generation is None:
        return {}
    settings = {key: value for key, value in generation.to_dict().items()
                if value is not None and not key.startswith("_") and key != "transformers_version"}  # fmt: skip
    return {key: _plain(value) for key, value in sorted(settings.items())}


def unapplied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change what transformers' ``generate`` answers, and that decoding here does not apply."""
    return {
        key: value
        for key, value in settings.items()
        if key not in SAMPLING | _NO_EFFECT and value not in _NEUTRAL.get(key, ()) and value not in ([], {})
    }


def sampling_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings that the model's makers chose; empty if they chose greedy decoding."""
    if not settings.get("do_sample"):
        return {}
    return {key: value for key, value in settings.items() if key in SAMPLING - {"do_sample"}}


def settings_warnings(settings: Mapping[str, Any]) -> list[str]:
    """Sentences about settings that the model's makers chose, and that a default request does not follow."""
    found, sampled = unapplied(settings), sampling_defaults(settings)
    warnings = []
    if found:
        listed = ", ".join(f"{key}={json.dumps(value):.60}" for key, value in found.items())
        warnings.append(
            f"The model's generation config sets {listed}. Decoding does not apply "
            f"{'these' if len(found) > 1 else 'it'}, so answers differ from those of transformers' generate. "
            "The bundle keeps the settings."
        )
    if settings.get("do_sample"):
        listed = ", ".join(f"{key}={value}" for key, value in sampled.items()) or "do_sample"
        warnings.append(
            f"The model's generation config asks for sampling ({listed}). Requests are greedy unless they ask for it."
        )
    return warnings


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return str(value)

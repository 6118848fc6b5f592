"""Writes tiny models as GGUF files, with the layouts and names of llama.cpp's converter, and reads them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from medusa_export.common.errors import CheckpointError, ModelNotSupportedError
from medusa_export.models.checkpoints import load_model

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # llama.cpp's names, where they differ


VOCAB = 300
PROMPT = torch.arange(24).unsqueeze(0) * 7 % 250


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of q or k as in llama.cpp's llama, which interleaves the two halves of each head."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def laid_out(architecture: str, name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """A weight in the layout of llama.cpp."""
    if architecture == "llama" and "q_proj." in name:
        return pairs(weight, config.num_attention_heads)
    if architecture == "llama" and "k_proj." in name:
        return pairs(weight, config.num_key_value_heads)
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return weight + 1
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return weight.T
    return weight


def usual_settings(architecture: str, config: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for any model."""
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    if architecture == "gpt2":
        return values | {
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
            "feed_forward_length": config.n_inner,
        }
    values |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "rope.dimension_count": head_dim}
    if architecture == "starcoder2":
        return values | {"attention.layer_norm_epsilon": config.norm_epsilon}
    return values | {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}


def write_gguf(
    file: Path,
    model: PreTrainedModel,
    settings: dict[str, Any] | None = None,
    *,
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    name: str = "tiny",
    with_tokenizer: bool = True,
    pre: str | None = "gpt-2",
    kind: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Writes a model in fp32, or with quantized matrices, with a byte-level vocabulary.

    Args:
        file: The file to write.
        model: The model.
        settings: More metadata under the architecture's name. The value None removes one of the usual keys.
        extra: Other metadata, by full key.
        tensors: More tensors, by name.
        name: The model's name in the file.
        with_tokenizer: Whether the file holds a vocabulary.
        pre: The pre-tokenizer's name in the file; None for no name.
        kind: The quantization of matrices; None for fp32.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(name)
    values = {**usual_settings(architecture, config), **(settings or {})}
    keys = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    for key, value in {**keys, **(extra or {})}.items():
        _add(writer, key, value)
    if with_tokenizer:
        _add_tokenizer(writer, config.vocab_size, pre)
    family = next(family for family, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(family, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for own, tensor in model.state_dict().items():
        if own == "lm_head.weight" and tied:
            continue
        stem, _, suffix = own.rpartition(".")
        weight = laid_out(architecture, own, tensor.numpy(), config)
        weight = np.ascontiguousarray(weight)
        if kind is None or weight.ndim == 1:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", weight)
        else:
            packed = gguf.quants.quantize(weight, kind)
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", packed, raw_dtype=kind)
    for own, array in (tensors or {}).items():
        writer.add_tensor(own, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, pre: str | None) -> None:
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += ["ab", "<end>", "12", *(f"[PAD{i}]" for i in range(vocab_size - len(tokens) - 3))]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<end>" else 1 for token in tokens])
    writer.add_token_merges(["a b", "1 2"])
    writer.add_eos_token_id(tokens.index("<end>"))
    writer.add_chat_template(CHAT_TEMPLATE)


def load(file: Path) -> PreTrainedModel:
    """Loads a model from a GGUF file."""
    return load_model(str(file), dtype=torch.float32)


def assert_same(file: Path, expected: PreTrainedModel) -> None:
    """Asserts that the model of a file gives the logits of another one."""
    torch.testing.assert_close(load(file)(PROMPT).logits, expected(PROMPT).logits, rtol=1e-4, atol=1e-4)


def refusal(file: Path) -> str:
    """The message with which a file is refused."""
    with pytest.raises((CheckpointError, ModelNotSupportedError)) as error:
        load(file)
    assert "\n" not in str(error.value)
    return str(error.value)

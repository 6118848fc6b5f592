"""Split text into words as ``tokenizer.ggml.pre`` of a GGUF file says.

transformers knows some of its names, and splits like GPT-2 for all others. This module adds llama.cpp's names for
other splits, and refuses names that neither knows.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from medusa_export.common.errors import CheckpointError
from medusa_export.compat.gguf import pre_tokenizer_splits

_AS_GPT2 = frozenset(
    {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat", "mellum"}
)
# Splits off each digit, and the rest like GPT-2.
_DIGITS_APART = frozenset({"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"})
_AS_OTHERS = {"stablelm2": "qwen2", "hunyuan": "qwen2", "solar-open": "qwen2"}


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, reader: Any, source: str) -> None:
    """Corrects the split of a tokenizer that transformers made from a GGUF file.

    Args:
        tokenizer: The tokenizer. It is changed in place.
        reader: The file, opened by ``gguf.GGUFReader``.
        source: The file's name, for messages.

    Raises:
        CheckpointError: The file names a split that is not known.
    """
    if _field(reader, "tokenizer.ggml.model") != "gpt2":
        return  # the others have one way to split each
    name = _field(reader, "tokenizer.ggml.pre")
    backend: Any = tokenizer
    known = pre_tokenizer_splits()
    if name in _DIGITS_APART:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True), words]
        backend.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    elif _AS_OTHERS.get(name) in known:
        split = known[_AS_OTHERS[name]]
        backend.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif name not in _AS_GPT2 and name not in known:
        said = "doesn't say how its tokenizer splits text" if name is None else f"splits text as {name!r} does"
        raise CheckpointError(
            f"The GGUF file {source} {said} (tokenizer.ggml.pre), which isn't known here: give the model's folder in "
            "Hugging Face's layout, or export with `with_tokenizer=False`."
        )


def _field(reader: Any, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None

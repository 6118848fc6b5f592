"""Folders of tokenizers, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_runtime.text.tokenizer import Tokenizer


def save(folder: Path, backend: tokenizers.Tokenizer, **settings: Any) -> Path:
    """Saves a tokenizer with transformers, and returns the folder."""
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **{"pad_token": "</s>"} | settings
    ).save_pretrained(folder)
    return folder


def load(folder: Path) -> Tokenizer:
    """Loads the tokenizer of a folder."""
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer

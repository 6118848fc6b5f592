"""A model for the tests of weights in several types."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.stock import Stock
from support.tiny_models import tiny_model


@pytest.fixture(scope="session")
def model_folder(stock: Stock) -> Path:
    """A tiny model with tied embeddings."""
    return stock.folder("tied", lambda out: tiny_model("qwen3").save_pretrained(out))

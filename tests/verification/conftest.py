"""A step that the tiny bundle was exported from, and a copy of the bundle to change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medusa_export.step.step import MedusaStep
from medusa_runtime import Bundle
from support.decoding import make_step, random_heads
from support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def step() -> MedusaStep:
    model = tiny_model("llama")
    return make_step(model, random_heads(model))


@pytest.fixture
def copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))
